# make demo         every stage of the consistency branch on the embedded digits, a table and a picture
# make demo-mf      the same for the mean-flow branch
# make test         all fast tests, two minutes
# make test-slow    the others, a few minutes more
# make gpu          on a GPU: tests, compile, one step of every recipe, bench, the digits demo (nine minutes)
# make bench        what a step of each method costs, as ratios
# make precision    what of each stage's loss and gradient survives bf16
# make theory       the figure of the gradient's bias (needs `pip install matplotlib`)
# make curves       distance against compute, with mid-training and without (hours; `pip install matplotlib`)
# make ablation     what each choice of the consistency branch is worth, a table in docs/ (two hours)
# make choose       N and the order of the solver, from the error of the teacher (an hour)
# make compare      the README's table: two seeds, plain ECT with three doubling intervals (an hour)
# make compare-mf   the README's other table: two seeds (three quarters of an hour)
# make scratch-mf   the same and Mean Flow from scratch (another half hour)
# Each first makes .venv from requirements.txt; `make PY=python3 test` uses an environment of yours instead.
PY ?= .venv/bin/python
ifeq ($(PY),.venv/bin/python)
ENV = .venv/installed
endif

demo: $(ENV)
	$(PY) tests/demo.py

demo-mf: $(ENV)
	$(PY) tests/demo.py --branch mf

test: $(ENV)
	$(PY) -m pytest

test-slow: $(ENV)
	$(PY) -m pytest -m slow

gpu: $(ENV)
	$(PY) experiments/gpu.py

bench: $(ENV)
	$(PY) tests/bench.py

ablation: $(ENV)
	$(PY) tests/ablation.py

precision: $(ENV)
	$(PY) tests/precision.py

curves: $(ENV)
	$(PY) tests/curves.py

theory: $(ENV)
	$(PY) tests/test_gradient_bias.py

choose: $(ENV)
	$(PY) tests/choose.py

compare: $(ENV)
	$(PY) tests/demo.py --seeds 2 --n 10000 --intervals 95 125 190

compare-mf: $(ENV)
	$(PY) tests/demo.py --branch mf --seeds 2 --n 10000

scratch-mf: $(ENV)
	$(PY) tests/demo.py --branch mf --seeds 2 --n 10000 --scratch

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.PHONY: demo demo-mf test test-slow gpu bench precision theory curves ablation choose compare compare-mf scratch-mf
