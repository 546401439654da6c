# One command a job, the same for a person and for CI. Everything is installed once, into .venv.
.DELETE_ON_ERROR:
.PHONY: demo test check clean

BUNDLE := bundles/brain_mri_tissue_invres
OUTPUT := demo
PYTHON ?= python3
TESTS  ?= tests

# The T1 template of 152 adults that comes with nilearn, skull-stripped; make demo IMAGE=scan.nii.gz takes your own.
TEMPLATE := mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz
IMAGE ?=

demo: .venv/installed
	@image="$(IMAGE)"; \
	if [ -z "$$image" ]; then \
		image="$$(.venv/bin/python -c 'import importlib.util as u; print(u.find_spec("nilearn").submodule_search_locations[0])')/datasets/data/$(TEMPLATE)"; \
	fi; \
	.venv/bin/python -m monai.bundle run --config_file $(BUNDLE)/configs/inference.json \
		--image "$$image" --output_dir "$(OUTPUT)" --overlay true

# Two processes with a thread each beat one process with two threads: most tests are many small operations.
test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal $(TESTS)

check: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

.venv/installed: requirements.txt pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -r requirements.txt
	.venv/bin/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv build demo *.egg-info .mypy_cache .pytest_cache .ruff_cache
