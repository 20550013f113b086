"""Vision backbones, built on timm and registered with it under the prefix `manyheads_`."""
