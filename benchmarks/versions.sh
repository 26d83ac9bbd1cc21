#!/usr/bin/env bash
# Runs the tests in fresh environments: the newest packages under every Python, the oldest under the oldest Python.
#
#   bash benchmarks/versions.sh                          all tests, hours on two cores
#   bash benchmarks/versions.sh -m golden                the comparison with the official numbers, minutes
#   PYTHONS="python3.12 python3.13" bash benchmarks/versions.sh tests/golden
#
# Arguments go to pytest. The oldest versions are the lower bounds of requirements.txt; what only the tests need is
# as new as fits beside them. The last lines are one row per environment; the exit status is 1 if any row failed.
set -euo pipefail
cd "$(dirname "$0")/.."

read -ra pythons <<<"${PYTHONS:-python3.11 python3.12 python3.13}"
rows=()
failed=0

run() { # PYTHON NAME CONSTRAINTS [PYTEST ARGUMENTS]
  local python=$1 name=$2 constraints=$3 environment result=passed versions=
  shift 3
  environment=$(mktemp -d)
  if "$python" -m venv "$environment" &&
    "$environment/bin/pip" install --quiet --disable-pip-version-check -r requirements-dev.txt -c "$constraints"; then
    versions=$("$environment/bin/python" -c 'import sys, torch, numpy, optree, mlflow
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, numpy {numpy.__version__}, "
      f"optree {optree.__version__}, mlflow {mlflow.__version__}")')
    echo "== $name: $versions"
    PATH="$environment/bin:$PATH" "$environment/bin/python" -m pytest "$@" || result=FAILED
  else
    result='NOT INSTALLED'
  fi
  [[ $result == passed ]] || failed=1
  rows+=("$(printf '%-14s %-8s %s' "$result" "$name" "${versions:-$python}")")
  rm -rf "$environment"
}

oldest=$(mktemp)
trap 'rm -f "$oldest"' EXIT
sed -n 's/^\([a-z0-9-]*\)>=\([0-9.]*\)$/\1==\2.*/p' requirements.txt >"$oldest"
run "${pythons[0]}" oldest "$oldest" "$@"
for python in "${pythons[@]}"; do
  run "$python" newest /dev/null "$@"
done
echo
printf '%s\n' "${rows[@]}"
exit "$failed"
