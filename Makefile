# make demo        every stage on the embedded digits, a table and a picture
# make test        all fast tests
# make compare     the README's table: two seeds, plain ECT with three doubling intervals (an hour)
# Each first makes .venv from requirements.txt; `make PY=python3 test` uses an environment of yours instead.
PY ?= .venv/bin/python
ifeq ($(PY),.venv/bin/python)
ENV = .venv/installed
endif

demo: $(ENV)
	$(PY) tests/demo.py

test: $(ENV)
	$(PY) -m pytest

compare: $(ENV)
	$(PY) tests/demo.py --seeds 2 --n 10000 --intervals 95 125 190

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.PHONY: demo test compare
