"""Inception v3 for FID in PyTorch, written from torchvision's published layers.

torchvision itself, and so pytorch-fid, needs a build of PyTorch that fits it and is not
everywhere. Where they can be imported, a test compares with them as well.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Conv(nn.Module):
  def __init__(self, cin, cout, **options):
    super().__init__()
    self.conv = nn.Conv2d(cin, cout, bias=False, **options)
    self.bn = nn.BatchNorm2d(cout, eps=0.001)

  def forward(self, x):
    return F.relu(self.bn(self.conv(x)))


def mean_pool(x):
  return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
  return F.max_pool2d(x, 3, stride=1, padding=1)


class A(nn.Module):
  def __init__(self, cin, pool):
    super().__init__()
    self.branch1x1 = Conv(cin, 64, kernel_size=1)
    self.branch5x5_1 = Conv(cin, 48, kernel_size=1)
    self.branch5x5_2 = Conv(48, 64, kernel_size=5, padding=2)
    self.branch3x3dbl_1 = Conv(cin, 64, kernel_size=1)
    self.branch3x3dbl_2 = Conv(64, 96, kernel_size=3, padding=1)
    self.branch3x3dbl_3 = Conv(96, 96, kernel_size=3, padding=1)
    self.branch_pool = Conv(cin, pool, kernel_size=1)

  def forward(self, x):
    five = self.branch5x5_2(self.branch5x5_1(x))
    double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
    pool = self.branch_pool(mean_pool(x))
    return torch.cat([self.branch1x1(x), five, double, pool], 1)


class B(nn.Module):
  def __init__(self, cin):
    super().__init__()
    self.branch3x3 = Conv(cin, 384, kernel_size=3, stride=2)
    self.branch3x3dbl_1 = Conv(cin, 64, kernel_size=1)
    self.branch3x3dbl_2 = Conv(64, 96, kernel_size=3, padding=1)
    self.branch3x3dbl_3 = Conv(96, 96, kernel_size=3, stride=2)

  def forward(self, x):
    double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
    return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class C(nn.Module):
  def __init__(self, cin, c):
    super().__init__()
    row = {"kernel_size": (1, 7), "padding": (0, 3)}
    column = {"kernel_size": (7, 1), "padding": (3, 0)}
    self.branch1x1 = Conv(cin, 192, kernel_size=1)
    self.branch7x7_1 = Conv(cin, c, kernel_size=1)
    self.branch7x7_2 = Conv(c, c, **row)
    self.branch7x7_3 = Conv(c, 192, **column)
    self.branch7x7dbl_1 = Conv(cin, c, kernel_size=1)
    self.branch7x7dbl_2 = Conv(c, c, **column)
    self.branch7x7dbl_3 = Conv(c, c, **row)
    self.branch7x7dbl_4 = Conv(c, c, **column)
    self.branch7x7dbl_5 = Conv(c, 192, **row)
    self.branch_pool = Conv(cin, 192, kernel_size=1)

  def forward(self, x):
    seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
    double = x
    for i in range(1, 6):
      double = getattr(self, f"branch7x7dbl_{i}")(double)
    pool = self.branch_pool(mean_pool(x))
    return torch.cat([self.branch1x1(x), seven, double, pool], 1)


class D(nn.Module):
  def __init__(self, cin):
    super().__init__()
    self.branch3x3_1 = Conv(cin, 192, kernel_size=1)
    self.branch3x3_2 = Conv(192, 320, kernel_size=3, stride=2)
    self.branch7x7x3_1 = Conv(cin, 192, kernel_size=1)
    self.branch7x7x3_2 = Conv(192, 192, kernel_size=(1, 7), padding=(0, 3))
    self.branch7x7x3_3 = Conv(192, 192, kernel_size=(7, 1), padding=(3, 0))
    self.branch7x7x3_4 = Conv(192, 192, kernel_size=3, stride=2)

  def forward(self, x):
    seven = x
    for i in range(1, 5):
      seven = getattr(self, f"branch7x7x3_{i}")(seven)
    three = self.branch3x3_2(self.branch3x3_1(x))
    return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class E(nn.Module):
  def __init__(self, cin, pooling):
    super().__init__()
    self.pooling = pooling
    row = {"kernel_size": (1, 3), "padding": (0, 1)}
    column = {"kernel_size": (3, 1), "padding": (1, 0)}
    self.branch1x1 = Conv(cin, 320, kernel_size=1)
    self.branch3x3_1 = Conv(cin, 384, kernel_size=1)
    self.branch3x3_2a = Conv(384, 384, **row)
    self.branch3x3_2b = Conv(384, 384, **column)
    self.branch3x3dbl_1 = Conv(cin, 448, kernel_size=1)
    self.branch3x3dbl_2 = Conv(448, 384, kernel_size=3, padding=1)
    self.branch3x3dbl_3a = Conv(384, 384, **row)
    self.branch3x3dbl_3b = Conv(384, 384, **column)
    self.branch_pool = Conv(cin, 192, kernel_size=1)

  def forward(self, x):
    three = self.branch3x3_1(x)
    double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
    parts = [
      self.branch1x1(x),
      self.branch3x3_2a(three),
      self.branch3x3_2b(three),
      self.branch3x3dbl_3a(double),
      self.branch3x3dbl_3b(double),
      self.branch_pool(self.pooling(x)),
    ]
    return torch.cat(parts, 1)


class Twin(nn.Module):
  """RGB in [0, 1], (n, 3, 299, 299) → (n, 2048)."""

  def __init__(self):
    super().__init__()
    self.Conv2d_1a_3x3 = Conv(3, 32, kernel_size=3, stride=2)
    self.Conv2d_2a_3x3 = Conv(32, 32, kernel_size=3)
    self.Conv2d_2b_3x3 = Conv(32, 64, kernel_size=3, padding=1)
    self.Conv2d_3b_1x1 = Conv(64, 80, kernel_size=1)
    self.Conv2d_4a_3x3 = Conv(80, 192, kernel_size=3)
    self.Mixed_5b = A(192, 32)
    self.Mixed_5c = A(256, 64)
    self.Mixed_5d = A(288, 64)
    self.Mixed_6a = B(288)
    self.Mixed_6b = C(768, 128)
    self.Mixed_6c = C(768, 160)
    self.Mixed_6d = C(768, 160)
    self.Mixed_6e = C(768, 192)
    self.Mixed_7a = D(768)
    self.Mixed_7b = E(1280, mean_pool)
    self.Mixed_7c = E(2048, max_pool)
    self.fc = nn.Linear(2048, 1008)

  def forward(self, x):
    x = 2 * x - 1
    x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
    x = F.max_pool2d(x, 3, stride=2)
    x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
    for name in ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]:
      x = getattr(self, f"Mixed_{name}")(x)
    return x.mean((2, 3))


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
  """Random weights that keep the signal's size through relu; stored statistics too."""
  generator = torch.Generator().manual_seed(seed)

  def draw(like):
    return torch.randn(like.shape, generator=generator)

  with torch.no_grad():
    for name, tensor in module.state_dict().items():
      if tensor.ndim > 1:
        tensor.copy_(draw(tensor) * (2 / tensor[0].numel()) ** 0.5)
      elif name.endswith("running_var"):
        tensor.copy_(1 + 0.3 * draw(tensor).tanh())
      elif name.endswith("bn.weight"):
        tensor.copy_(1 + 0.1 * draw(tensor))
      elif tensor.is_floating_point():
        tensor.copy_(0.1 * draw(tensor))
  return module.eval()
