"""samples.jsonl: what the policy wrote, so that progress can be read and not only plotted."""

from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ConfigDict

from lambdapo_async.rollout import RolloutGroup
