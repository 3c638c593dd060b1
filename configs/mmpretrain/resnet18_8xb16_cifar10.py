# The dense recipe of mmpretrain, reading CIFAR-10 from the folder that the variable CIFAR10_ROOT
# names; mmsmart.datasets.PackedCIFAR10 says which forms it may take. Nothing is downloaded.
_base_ = ['mmpretrain::resnet/resnet18_8xb16_cifar10.py']

data_root = '{{$CIFAR10_ROOT:data/cifar10}}'
train_dataloader = dict(dataset=dict(type='mmsmart.PackedCIFAR10', data_root=data_root))
val_dataloader = dict(dataset=dict(type='mmsmart.PackedCIFAR10', data_root=data_root))
test_dataloader = val_dataloader
