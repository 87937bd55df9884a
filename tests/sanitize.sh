#!/bin/sh
# The tests of the C++ kernels under the address and undefined-behaviour sanitizers of g++ (Linux). From the root of a
# clone, after `make test` has set up .venv:
#
#     tests/sanitize.sh [pytest's arguments]
#
# Python is not built with the sanitizers, so their runtimes come first by LD_PRELOAD, and beside them libstdc++, whose
# throw they wrap. Python keeps memory to its end, so leaks are not looked for. A finding ends the process with its report,
# which pytest would keep to itself if it captured output.
set -eu
cxx=${CXX:-g++}
runtime() { "$cxx" -print-file-name="$1"; }
: "${PYTHON:=.venv/bin/python}"
export SPARSEDM_CPU_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
export ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1
tests=tests/kernels
[ $# -gt 0 ] || set -- -q -m "" $tests/test_fuzz.py $tests/test_cpu_kernel.py $tests/test_cpu_shared_rows.py $tests/test_cpu_checksum.py
LD_PRELOAD="$(runtime libasan.so) $(runtime libubsan.so) $(runtime libstdc++.so)" exec "$PYTHON" -P -m pytest --capture=no "$@"
