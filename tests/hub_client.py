"""Runs pieces of code one after another, for the Hub's client reads its endpoint when it is imported.

From each line of stdin, JSON with the code, the cache and the token to use; to stdout, JSON with what it printed and
the error it ended in.
"""
import contextlib
import io
import json
import os
import sys
from pathlib import Path

import timm
import torch
from huggingface_hub import constants

import timm_awm
from timm_awm import hub
from timm_awm_cli.main import main

torch.set_num_threads(1)
for line in sys.stdin:
    request = json.loads(line)
    constants.HF_HUB_CACHE = request['cache']
    os.environ['HF_TOKEN'] = request['token']
    printed, error = io.StringIO(), ''
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            exec(request['code'], dict(timm=timm, torch=torch, timm_awm=timm_awm, hub=hub, main=main, Path=Path))
        except Exception as problem:
            error = f'{type(problem).__name__}: {problem}'
    print(json.dumps(dict(printed=printed.getvalue(), error=error)), flush=True)
