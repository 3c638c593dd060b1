# SegFormer-B0 on ADE20K, 50 % of the weights removed. Give as `load_from`:
# upstream's segformer_mit-b0_512x512_160k_ade20k_20210726_101530-8ffa8fda.pth
_base_ = ['mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py', '../_base_/smart.py']

smart = dict(sparsity=0.5)
