"""Runs one experiment: `python launch.py --config=configs/digits.py`; `--help` explains every flag."""

from byol_func.program import run

if __name__ == '__main__':
    run()
