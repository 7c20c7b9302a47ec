# What mypy knows of the loss, whichever backend Keras runs on.

import negcache_core as core

from ._host import Host

HOST: Host | None

class NegativeCacheLoss(core.NegativeCacheLoss): ...
