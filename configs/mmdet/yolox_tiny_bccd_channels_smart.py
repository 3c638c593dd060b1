# Cut channels out of YOLOX-tiny on BCCD: half of the MACs leave, channel counts stay multiples of
# eight. Train yolox_tiny_bccd.py first and give its checkpoint as `load_from`.
_base_ = ['./yolox_tiny_bccd_smart.py']

smart = dict(sparsity=0.5, block='channel', resource='macs', round_to=8)
