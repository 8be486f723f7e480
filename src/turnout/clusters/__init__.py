"""Machines, one description a file, every number with its source beside it; CLUSTERS lists them."""

from turnout.clusters.a800 import A800
from turnout.clusters.ascend_910b import ASCEND_910B
from turnout.clusters.aws_p5 import AWS_P5
from turnout.clusters.dgx2_v100 import DGX2_V100
from turnout.clusters.dgx_a100 import DGX_A100, DGX_A100_40
from turnout.clusters.dgx_b200 import DGX_B200
from turnout.clusters.dgx_b300 import DGX_B300
from turnout.clusters.dgx_h100 import DGX_H100, H100_HBM2E
from turnout.clusters.dgx_h200 import DGX_H200
from turnout.clusters.ethernet_100g import ETHERNET_100G
from turnout.clusters.gb200_nvl72 import GB200_NVL72
from turnout.clusters.gb300_nvl72 import GB300_NVL72
from turnout.clusters.h800 import H800
from turnout.clusters.mi300x import MI300X
from turnout.clusters.table import CLUSTERS
from turnout.clusters.tpu_v4 import TPU_V4
from turnout.clusters.tpu_v5p import TPU_V5P
from turnout.clusters.user import cluster_from, load_cluster

__all__ = [
    "A800",
    "ASCEND_910B",
    "AWS_P5",
    "CLUSTERS",
    "DGX2_V100",
    "DGX_A100",
    "DGX_A100_40",
    "DGX_B200",
    "DGX_B300",
    "DGX_H100",
    "DGX_H200",
    "ETHERNET_100G",
    "GB200_NVL72",
    "GB300_NVL72",
    "H100_HBM2E",
    "H800",
    "MI300X",
    "TPU_V4",
    "TPU_V5P",
    "cluster_from",
    "load_cluster",
]
