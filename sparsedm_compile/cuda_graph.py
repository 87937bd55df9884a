"""CUDA graphs of repeated calls: what work costs the GPU, without what launching it costs the host."""

from collections.abc import Callable

import torch


def capture(run: Callable[[], object], calls: int) -> Callable[[], object]:
    """A function that replays ``calls`` calls of ``run``, captured into one CUDA graph.

    ``run`` is called three times before, on a stream of its own, so that it compiles, tunes and allocates what it
    needs outside of the capture.

    Raises:
        RuntimeError: ``run`` does something that a capture forbids, such as waiting for the GPU.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads of the process may allocate meanwhile: only this one is held to the rules of a capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            run()
    return graph.replay
