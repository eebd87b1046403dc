# One recipe for each thing that CONTRIBUTING.md names: `just` lists them. Without just, copy the line.

python := if os_family() == "windows" { ".venv/Scripts/python" } else { ".venv/bin/python" }

default:
    @just --list

# A virtual environment with everything that tests and lint need
setup:
    python3 -m venv .venv
    {{python}} -m pip install -c constraints.txt -e '.[dev]'

# The quick tests, one process per core
quick:
    {{python}} -m pytest -n auto -m 'not slow'

# One test file in one process: just one tests/test_promises.py -x --pdb
one FILE *MORE:
    {{python}} -m pytest {{FILE}} {{MORE}}

# Kills, faults, full disks, batch jobs
slow:
    {{python}} -m pytest -m slow

# Quick and slow tests
all:
    {{python}} -m pytest -n auto

# The tests on a real ACE-Step checkout: just checkout ~/ACE-Step-1.5
checkout DIR:
    {{python}} -m pytest --acestep-root={{DIR}}

# Lint, format, types, import contracts
lint:
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .
    {{python}} -m mypy
    {{python}} -c "from importlinter.cli import lint_imports_command as check; check()"

# Everything that CI runs, in new environments
ci:
    .ci/run

# Write the generated pages
docs:
    {{python}} tests/tools/hook_reference.py
    {{python}} tests/tools/api_reference.py
    {{python}} tests/tools/memory_table.py
    {{python}} tests/tools/readers_table.py
    {{python}} tests/tools/measured_table.py

# What only a GPU shows
gpu *MORE:
    {{python}} -m pytest -m gpu tests/gpu {{MORE}}

# Break the code on purpose; every mistake must be caught by a test
mutations:
    {{python}} tests/tools/mutations.py

# Kill trainings, fill disks, lock folders, cut files off
faults:
    {{python}} tests/tools/faults.py
