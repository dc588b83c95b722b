# Each target makes the virtual environment it needs, so that a fresh clone needs only Python, git and make.
PYTHON ?= python3
NEWEST := 2.13.0
TORCH ?= $(NEWEST)
GRADIO ?= 3.41
VENV ?= .venv
ARGS ?=
DEVICE ?=
DEVICE_PYTHON ?=

BIN := $(VENV)/bin
READY := $(VENV)/ready
CONSTRAINTS := requirements/gradio-$(GRADIO).txt
FORMS := $(wildcard .github/ISSUE_TEMPLATE/*.yml)

.PHONY: demo test test-all unit device lint clean

demo: $(READY)
	$(BIN)/python -m demo $(ARGS)

test: $(READY) lint
	$(BIN)/python -m pytest $(ARGS)

# What development uses; what the web UI pins, so what users run; and Forge's gradio, with the first one's torch: whatever has a page.
test-all:
	$(MAKE) test
	$(MAKE) test VENV=.venv-torch-2.1.2 TORCH=2.1.2
	$(MAKE) test VENV=.venv-gradio-4.40 GRADIO=4.40 ARGS="$(or $(ARGS),tests/demo tests/host)"

# The library alone, which other systems, Pythons and torches run with no more than requirements/unit.txt.
unit: $(READY)
	$(BIN)/python -m pytest --unit $(ARGS)

# On the best accelerator here, or on DEVICE. DEVICE_PYTHON is another Python whose torch knows it, such as the web UI's.
device: $(if $(DEVICE_PYTHON),,$(READY))
	$(or $(DEVICE_PYTHON),$(BIN)/python) -m tools.device $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
# With one torch's types: others say other things of the same names, and older ones lack some.
ifeq ($(TORCH),$(NEWEST))
	$(BIN)/mypy
endif
# What a forge would say after a push only. The tool holds the schemas, those of schemastore.org.
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(FORMS))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config $(filter %/config.yml,$(FORMS))

$(READY): requirements/demo.txt requirements/unit.txt requirements/test.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) -r requirements/test.txt -c $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps stable-diffusion-sdkit==2.1.5
	touch $(READY)

clean:
	rm -rf .venv .venv-torch-2.1.2 .venv-gradio-4.40
