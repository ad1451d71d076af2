# make demo         the consistency branch on the embedded digits: a table and a picture (9 minutes on two CPU cores)
# make demo-mf      the Mean Flow branch (18 minutes)
# make test         the fast tests (7 minutes)
# make test-slow    killed runs, damaged files, compiled networks on two ranks, an emulated GPU, theory (17 minutes)
# make gpu          on a GPU: tests, compile, one step of every recipe, bench, the digits demo (under an hour)
# make NAME         another experiment: bench (10 minutes), precision (1 hour), compare (2 hours), compare-mf
#                   (1 hour), ablation (3 hours), share (2 hours), curves (5 hours), choose (1 hour), mnist
#                   (15 hours), theory
# All first make .venv from requirements.txt; `make PY=python3 test` uses your own environment instead.
PY ?= .venv/bin/python
ifeq ($(PY),.venv/bin/python)
ENV = .venv/installed
endif

demo: $(ENV)
	$(PY) experiments/demo.py

demo-mf: $(ENV)
	$(PY) experiments/demo.py --branch mf

test: $(ENV)
	$(PY) -m pytest

test-slow: $(ENV)
	$(PY) -m pytest -m slow

bench precision ablation share curves choose gpu mnist: $(ENV)
	$(PY) experiments/$@.py

compare: $(ENV)
	$(PY) experiments/demo.py --seeds 0-4 --n 10000 --intervals 50 70 95

compare-mf: $(ENV)
	$(PY) experiments/demo.py --branch mf --seeds 0-1 --n 10000 $(FLAGS)

theory: $(ENV)
	$(PY) tests/test_gradient_bias.py

.venv/installed: requirements.txt
	@python3 -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; python3 is " \
		+ sys.version.split()[0] + ". Make an environment with a newer one and use make PY=path/to/python.")'
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.PHONY: demo demo-mf test test-slow bench precision ablation share curves choose gpu mnist compare compare-mf theory
