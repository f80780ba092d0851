# make train            makes .venv, installs, stitches the launcher, trains
# make train PY=python3 uses the Python you name, and installs nothing
PYTHON ?= python3
PY ?= .venv/bin/python
ARGS ?=
ifeq ($(PY),.venv/bin/python)
ENV := .venv/.installed
BROWSER_ENV := .venv/.browser
endif
CHROMIUM ?= chromium
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.DEFAULT_GOAL := help
.PHONY: help train test test-kernels test-browser lab launcher notebooks site bench tensorboard

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo "  ARGS='...' passes flags on; PY=python3 uses an environment of yours and installs nothing"

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name a newer one: make train PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

.venv/.browser: requirements-browser.txt .venv/.installed
	.venv/bin/python -m pip install --disable-pip-version-check -q -r requirements-browser.txt
	@touch $@

train: launcher ## train the default model with torchrun (ARGS="--steps 500")
	@$(PY) tools/launch.py $(ARGS)

launcher: $(ENV) ## stitch notebooks/ into ep_launcher/launcher.py, if it is stale
	@$(PY) tools/extract.py

# Three workers on two cores: while one waits for ranks that hang or were killed, the others work.
test: $(ENV) ## run every check: tests, lint, every notebook
	$(PY) -m pytest -n 3 $(ARGS)

build/triton: $(ENV)  # beside the environment, whose torch may want another Triton
	@mkdir -p build
	$(PY) -m pip install --disable-pip-version-check -q --no-deps --target $@ triton==3.6.0 || { rm -rf $@; exit 1; }

test-kernels: $(ENV) build/triton ## run the GPU kernels' tests without a GPU, under Triton's interpreter
	TRITON_INTERPRET=1 PYTHONPATH=build/triton $(PY) -m pytest tests/fast/test_kernels.py $(ARGS)

test-browser: $(ENV) $(BROWSER_ENV) ## read the book in a browser: every notebook, TensorBoard, the site
	@command -v $(CHROMIUM) >/dev/null || { echo "error: $(CHROMIUM) is not here: \`apt-get install -y chromium\`," \
	  "or name one: make test-browser CHROMIUM=/path" >&2; exit 2; }
	@$(PY) -c "import playwright" 2>/dev/null || { echo "error: $(PY) has no playwright:" \
	  "\`$(PY) -m pip install -r requirements-browser.txt\` (it needs no browser download)" >&2; exit 2; }
	CHROMIUM=$(CHROMIUM) $(PY) -m pytest tests/browser $(ARGS)

notebooks: launcher ## execute every notebook headless, into build/notebooks/
	@$(PY) tools/notebooks.py $(ARGS)

site: $(ENV) ## build the book as pages for any browser, into build/site/
	@$(PY) tools/site.py $(ARGS)

bench: launcher ## measure a training step, into results/ (ARGS="--help"; the rest of measure/ has more)
	@$(PY) measure/step.py $(ARGS)

lab: launcher ## open the book in JupyterLab, on this machine only, with its token
	$(PY) -m jupyterlab --ip=127.0.0.1 --notebook-dir=. $(AS_ROOT) $(ARGS)

tensorboard: $(ENV) ## look at the runs in TensorBoard, on this machine only
	$(PY) -m tensorboard.main --logdir ep_launcher/runs --host 127.0.0.1 $(ARGS)
