"""Published backbones whose softmax attention can be exchanged block by block: DeiT, PVT, Swin, CSwin."""

from manyheads.models.vision.hosts.common import Host, HostDense
from manyheads.models.vision.hosts.cswin import HostCSwin
from manyheads.models.vision.hosts.deit import HostDeiT
from manyheads.models.vision.hosts.pvt import HostPVT
from manyheads.models.vision.hosts.swin import HostSwin

__all__ = ["Host", "HostCSwin", "HostDeiT", "HostDense", "HostPVT", "HostSwin"]
