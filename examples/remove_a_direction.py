"""A refusal direction found and removed from a model's weights, with the effect measured.

python examples/remove_a_direction.py MODEL REFUSED.txt ANSWERED.txt edited
"""

import sys
from pathlib import Path

import mergelab as ml

model, refused, answered, out = sys.argv[1:5]
try:
    report = ml.abliterate(
        model, out, Path(refused).read_text().splitlines(), Path(answered).read_text().splitlines()
    )
except ml.errors.MergelabError as error:
    sys.exit(f"nothing was written: {error}")  # such as of a model that does not refuse
print(f"direction of {report.selection}; {out}/README.md says what it changed")
