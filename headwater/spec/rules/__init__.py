"""Rules: what a server does with a gradient. Each name of a module stands here too.

A new rule is a class in one of these modules, its function in `headwater.spec.formulas`, and its name in
`headwater/__init__.py`. Importing this package registers all of them, so that messages can name them.
"""

from headwater.spec.registry import register as register
from headwater.spec.rules.adaptive import *
from headwater.spec.rules.descent import *
from headwater.spec.rules.moments import *
from headwater.spec.rules.rule import *
