# demo: the picture, trained now (about 2 minutes on two cores)   test: every test, files side by side   lab: the notebooks in JupyterLab
# site: the course as static pages, in site/   slides: the lecture, in site/slides/
# handout: the lab's copies, sheet and rubric, in handout/
# cloud ADDRESS=https://...: notebooks that install minimoe from the site at that address
# notebooks: run them again, in place    student: copies without answers    data: the shipped sweeps again (a day of two cores)
# figure: the README's pictures          lint: ruff                         clean: remove what these made
PYTHON ?= python3

demo: .venv/installed
	.venv/bin/minimoe demo

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile

lab: .venv/installed
	.venv/bin/jupyter lab notebooks

notebooks: .venv/installed
	PATH=$(CURDIR)/.venv/bin:$$PATH .venv/bin/python tools/notebooks.py run
	.venv/bin/python tools/notebooks.py gallery

site: .venv/installed
	.venv/bin/python tools/website.py
	.venv/bin/python tools/slides.py

slides: .venv/installed
	.venv/bin/python tools/slides.py

student: .venv/installed
	.venv/bin/python tools/notebooks.py student

handout: .venv/installed
	.venv/bin/python tools/handout.py

cloud: .venv/installed
	.venv/bin/python tools/cloud.py $(ADDRESS)

data: .venv/installed
	.venv/bin/python data/make.py

figure: demo
	cp runs/demo.png docs/demo.png
	.venv/bin/python tools/story.py
	.venv/bin/minimoe coords --parametrization simplep --figure docs/coordinates.png

lint: .venv/installed
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.lock
	.venv/bin/python -m pip install --disable-pip-version-check --no-deps mup==1.0.0  # a test's oracle; it asks for torchvision
	.venv/bin/python -m pip install --disable-pip-version-check --no-deps sphinx-revealjs==3.2.1  # it brings reveal.js, for the slides
	.venv/bin/python -m pip install --disable-pip-version-check --no-deps --editable .
	touch .venv/installed

clean:
	rm -rf .venv runs student site handout

.PHONY: demo test lab notebooks site slides student handout cloud data figure lint clean
