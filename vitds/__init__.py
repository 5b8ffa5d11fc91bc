"""vitds: Vision Transformers of the "Scaling Vision Transformers" family, trained on DeepSpeed.

Importing the package registers its model, configuration and image processor with transformers' Auto classes;
it starts nothing and imports no DeepSpeed.
"""

from vitds import models as models

__version__ = "0.1.0"
