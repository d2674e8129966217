from unveil.api import embed as embed
from unveil.api import finetune as finetune
from unveil.api import predict as predict
from unveil.api import pretrain as pretrain
from unveil.api import probe as probe
from unveil.checkpoint import load_model as load_model
from unveil.inpainting import InpaintPipeline as InpaintPipeline
from unveil.pipeline import generate as generate
from unveil.pipeline import repaint as repaint
from unveil.pretrained import create_model as create_model
from unveil.pretrained import from_pretrained as from_pretrained
from unveil.pretrained import push_to_hub as push_to_hub
from unveil.pretrained import save_pretrained as save_pretrained

__version__: str
