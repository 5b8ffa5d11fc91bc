"""`import vitds` registers its classes with transformers, whichever is imported first, and imports nothing heavy itself."""

import subprocess
import sys

import pytest

KNOWN = "assert AutoConfig.for_model('vitds').model_type == 'vitds'; assert not AutoImageProcessor.__module__.startswith('transformers.utils')"
OURS = "from transformers.pipelines import PIPELINE_REGISTRY as r; assert r.supported_tasks['image-classification']['impl'].__module__.startswith('vitds')"
NAMES = "from transformers import AutoConfig, AutoImageProcessor"


@pytest.mark.parametrize(
    "program",
    [
        f"import vitds\n{NAMES}\n{KNOWN}",
        f"{NAMES}\nimport vitds\nfrom transformers import AutoImageProcessor\n{KNOWN}",
        f"import vitds, importlib.util\nassert importlib.util.find_spec('transformers')\n{NAMES}\n{KNOWN}",
        f"from vitds.models import ViTConfig\n{NAMES}\n{KNOWN}",
        "import vitds\nassert vitds.models.VARIANTS",
        f"import sys, vitds, transformers\nassert 'transformers.pipelines' not in sys.modules\n{OURS}",
        f"import transformers.pipelines\nimport vitds\n{OURS}",
        "import sys, vitds, vitds.errors\nassert not {'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules)",
    ],
    ids=["before", "after", "asked for first", "by its models", "attribute", "pipelines", "pipelines before", "light"],
)
def test_in_a_new_interpreter(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
