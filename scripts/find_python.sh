#!/bin/sh
# Print the interpreter that set-up uses: $PYTHON, else the first of python3, python3.12, ... that serves.
set -u
here=$(dirname "$0")
reasons=""
for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10 python3.13}; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if found=$("$candidate" "$here/check_python.py" 2>&1); then
        echo "$found"
        exit 0
    fi
    reasons="$reasons
  $candidate: $(echo "$found" | tail -n 1)"
done
echo "No Python that serves was found. Looked at: ${reasons:-${PYTHON:-python3} (no such command)}
Name another one with PYTHON=/path/to/python3." >&2
exit 1
