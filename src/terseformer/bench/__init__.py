"""Decoding speed, measured so that the numbers can be trusted."""

from terseformer.bench.decode import bench as bench
from terseformer.bench.decode import tune as tune
from terseformer.bench.groups import GROUPS as GROUPS
from terseformer.bench.report import show as show
