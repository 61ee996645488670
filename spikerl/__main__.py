"""`python -m spikerl`, without the current folder on the path, where -m puts it first."""

import os
import sys

if not sys.flags.safe_path:
    here, root = sys.path.pop(0), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if here == root:  # a checkout that is not installed: workers import the same
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        sys.path.insert(0, root)

from spikerl.cli.main import main

main()
