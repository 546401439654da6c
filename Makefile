# One command a job, the same for a person and for CI. Everything is installed once, into .venv.
.DELETE_ON_ERROR:
.PHONY: demo install test bench check label-server scans-to-serve test-label clean

BUNDLE := bundles/brain_mri_tissue_invres
OUTPUT := demo
PYTHON ?= python3
TESTS  ?= tests

# The T1 template of 152 adults that comes with nilearn, skull-stripped; make demo IMAGE=scan.nii.gz takes your own.
TEMPLATE := mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz
IMAGE ?=

# MONAI Label: a folder of scans, where the server keeps its bundles and what it trains, its address.
STUDIES       ?=
LABEL_APP     ?= label_app
LABEL_PORT    ?= 8000
LABEL_BUNDLES := brain_mri_tissue_invres brain_mri_tumor_invres
LABEL_PYTHON  := .venv-label/bin/python

demo: .venv/installed
	@image="$(IMAGE)"; \
	if [ -z "$$image" ]; then \
		image="$$(.venv/bin/python -c 'import importlib.util as u; print(u.find_spec("nilearn").submodule_search_locations[0])')/datasets/data/$(TEMPLATE)"; \
	fi; \
	.venv/bin/python -m monai.bundle run --config_file $(BUNDLE)/configs/inference.json \
		--image "$$image" --output_dir "$(OUTPUT)" --overlay true

install: .venv/installed

# Two processes with a thread each beat one process with two threads: most tests are many small operations.
test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal $(TESTS)

# Beside other libraries, where they are installed: see docs/benchmark.md.
bench: .venv/installed
	.venv/bin/python -m memnet bench --output_dir benchmark

check: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

# Copies, so that nothing the server writes reaches the shipped weights; what it trains lands in models/, where it looks for
# weights. It numbers labels by the network's channels, so the enhancing tumour is 3 here rather than BraTS's 4.
label-server: scans-to-serve .venv-label/installed
	test -d "$(LABEL_APP)" || $(LABEL_PYTHON) -m monailabel.main apps --download --name monaibundle --output "$(LABEL_APP)"
	@for bundle in $(LABEL_BUNDLES); do \
		copy="$(LABEL_APP)/monaibundle/model/$$bundle"; \
		mkdir -p "$$copy/models" && ln -sfn models "$$copy/eval" && \
		cp -R bundles/$$bundle/LICENSE bundles/$$bundle/configs bundles/$$bundle/docs "$$copy" && \
		sed 's/"enhancing_label": 4/"enhancing_label": 3/' bundles/$$bundle/configs/inference.json \
			> "$$copy/configs/inference.json" && \
		cp bundles/$$bundle/models/model.pt "$$copy/models" || exit 1; \
	done
	$(LABEL_PYTHON) -m monailabel.main start_server --app "$(LABEL_APP)/monaibundle" --studies "$(STUDIES)" \
		--host 127.0.0.1 --port $(LABEL_PORT) --conf zoo_source local --conf sam2 false \
		--conf models $(shell echo $(LABEL_BUNDLES) | tr ' ' ,)

# before the environment, whose installation takes minutes
scans-to-serve:
	@test -d "$(STUDIES)" || { echo "which folder holds the scans? make label-server STUDIES=folder" >&2; exit 2; }

# Apart from `make test`, since the environment takes minutes to install and the server minutes to train.
test-label: .venv/installed .venv-label/installed
	.venv/bin/python -m pytest tests/hosts/monai_label.py

.venv/installed: requirements.txt pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -r requirements.txt
	.venv/bin/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

# A torch without CUDA beside PyPI's torchvision: the operators of the one want the other's CUDA, so the two operators that
# importing torchvision asks for are declared. pip may find one thing amiss, that sam2 is left out.
.venv-label/installed: requirements-label.txt pyproject.toml
	test -x $(LABEL_PYTHON) || $(PYTHON) -m venv .venv-label
	$(LABEL_PYTHON) -m pip install --no-deps -r requirements-label.txt
	$(LABEL_PYTHON) -m pip install --no-deps --no-build-isolation -e .
	$(LABEL_PYTHON) -c "import torchvision" 2> /dev/null || printf '%s\n' 'for _name in ("nms", "qnms"):' \
		'    torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")' \
		| tee -a .venv-label/lib/python3*/site-packages/torchvision/extension.py
	$(LABEL_PYTHON) -c "import torchvision"
	test "$$($(LABEL_PYTHON) -m pip check)" = "monailabel 0.8.5 requires sam2, which is not installed."
	touch $@

clean:
	rm -rf .venv .venv-label build demo *.egg-info .mypy_cache .pytest_cache .ruff_cache
