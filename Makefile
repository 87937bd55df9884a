# Each target sets up what it needs in .venv; when that is done already, it costs nothing.
#   make demo     a pretrained model made 2:4 sparse, fine-tuned, compiled, sampled and timed; some minutes
#   make test     lint and tests
#   make bench    kernels and whole models against dense, some ten minutes; writes bench/results/ and bench/report/
#   make bench-full  all of them, and scaling, costs and fidelity; hours
#   make gpu      what a GPU can show, in nine minutes: right and fast; with the machine's own python3, nothing fetched
#   make lint     ruff alone

PYTHON ?= python3
BIN := .venv/bin
# Tools run as modules, since those that a user's Python already has leave no script in .venv; -P keeps kernels/ and
# passes/, which install below sparsedm_compile, from being importable by their folder names.
RUN := $(BIN)/python -P -m
INSTALLED := .venv/.installed

.PHONY: demo test bench bench-full gpu lint clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/sparsedm demo

test: lint
	$(RUN) pytest

lint: $(INSTALLED)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

bench: $(INSTALLED)
	$(BIN)/python bench/kernels_cpu.py --minutes 4
	$(BIN)/python bench/end_to_end.py --quick --seconds 20
	$(BIN)/sparsedm bench report

bench-full: $(INSTALLED)
	$(BIN)/python bench/kernels_cpu.py --minutes 120
	$(BIN)/python bench/end_to_end.py
	$(BIN)/python bench/end_to_end.py --threads 1 --only uvit-s-2
	$(BIN)/python bench/scaling.py
	$(BIN)/python bench/fidelity.py
	$(BIN)/sparsedm bench report --readme README.md

gpu:
	$(PYTHON) bench/gpu.py $(GPU_FLAGS)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks

# The user's own torch is kept where it has CUDA: a .pth file shows it to .venv, also out of another virtual environment.
# Elsewhere torch comes first, at the version of constraints.txt, so that nothing that needs torch can bring another one.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or later is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    echo "keeping the CUDA build of torch that $(PYTHON) has"; \
	    $(PYTHON) -c 'import torch; print("torch==" + torch.__version__)' > .venv/constraints.txt && \
	    $(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	        > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch-of-user.pth"; \
	else \
	    cp constraints.txt .venv/constraints.txt && \
	    $(BIN)/pip install -q -c .venv/constraints.txt torch; \
	fi
	$(BIN)/pip install -q -c .venv/constraints.txt -e '.[test]'
	@touch $@
