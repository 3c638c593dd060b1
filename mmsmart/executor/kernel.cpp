// Convolution over the kept blocks of a weight, float32 on the CPU. Linear layers are the case 1x1.
//
// Sixteen output channels are one vector. For each such row of blocks, and for a run of P output
// pixels whose P sums stay in registers, the kernel walks over the units that are left of the
// weight: UNIT input channels at one kernel position. What is zero is neither stored nor visited.
//
// The input is packed first, zero padding included, as (channels / 16, phase, row, column, 16): the
// stride's phases are planes of their own, so that neighbouring output pixels read neighbouring
// vectors whatever the stride, and the addresses in the innermost loop are constants. An output
// row continues into the next one across a few columns that are computed and not stored; that keeps
// every run at the same length.
//
// Vectors are those of GCC and Clang, without intrinsics: one register with AVX-512, two with AVX2,
// four with NEON.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4)));

// Lengths of a run. The sums, a vector of weights and a factor must fit into the registers.
#ifdef __AVX512F__
constexpr int kRuns[] = {1, 8, 12, 16, 20, 24, 28};
#else
constexpr int kRuns[] = {1, 6};
#endif
constexpr int64_t kLongest = kRuns[sizeof(kRuns) / sizeof(kRuns[0]) - 1];

constexpr int64_t kImageFloats = 1 << 18;  // images are packed together up to 1 MiB
constexpr int64_t kChunkFloats = 1 << 15;  // of the input pass under all rows of blocks in turn

template <int P, int UNIT>
void run(const float* input, const int64_t* offsets, const float* weight, int64_t units,
         const float* bias, float* output) {
  Vec sums[P];
#pragma GCC unroll 32
  for (int p = 0; p < P; ++p) sums[p] = *reinterpret_cast<const Vec*>(bias);
  for (int64_t k = 0; k < units; ++k, weight += UNIT * kLanes) {
    const float* pixels = input + offsets[k];
#pragma GCC unroll 8
    for (int c = 0; c < UNIT; ++c) {
      const Vec w = *reinterpret_cast<const Vec*>(weight + c * kLanes);
#pragma GCC unroll 32
      for (int p = 0; p < P; ++p) sums[p] += w * pixels[p * kLanes + c];
    }
  }
#pragma GCC unroll 32
  for (int p = 0; p < P; ++p) *reinterpret_cast<Vec*>(output + p * kLanes) = sums[p];
}

using Run = decltype(&run<1, 1>);

template <int UNIT>
Run run_of_length(int length) {
  switch (length) {
#ifdef __AVX512F__
    case 8: return run<8, UNIT>;
    case 12: return run<12, UNIT>;
    case 16: return run<16, UNIT>;
    case 20: return run<20, UNIT>;
    case 24: return run<24, UNIT>;
    case 28: return run<28, UNIT>;
#else
    case 6: return run<6, UNIT>;
#endif
    default: return run<1, UNIT>;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Fewer than eight sums wait for each other; a run costs about one more pixel to start and store.
int best_length(int64_t pixels) {
  int best = 1;
  int64_t least = INT64_MAX;
  for (int length : kRuns) {
    const int64_t cost = ceil_div(pixels, length) * (std::max(length, 8) + 1);
    if (cost < least) least = cost, best = length;
  }
  return best;
}

struct Geometry {
  int64_t channels, height, width, out_height, out_width;
  int64_t stride_h, stride_w, pad_h, pad_w;
  int64_t blocks;         // of 16 input channels
  int64_t rows, columns;  // of one plane: a phase of a block of channels
  int64_t plane, image;   // in floats
  int64_t channel_step, row_step, column_step;  // of the input, whatever its memory format

  Geometry(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
           at::IntArrayRef padding, at::IntArrayRef dilation)
      : channels(x.size(1)), height(x.size(2)), width(x.size(3)),
        stride_h(stride[0]), stride_w(stride[1]), pad_h(padding[0]), pad_w(padding[1]),
        channel_step(x.stride(1)), row_step(x.stride(2)), column_step(x.stride(3)) {
    const int64_t reach_h = dilation[0] * (kernel[0] - 1), reach_w = dilation[1] * (kernel[1] - 1);
    TORCH_CHECK(height + 2 * pad_h > reach_h && width + 2 * pad_w > reach_w,
                "executor: the kernel is larger than the padded input.");
    out_height = (height + 2 * pad_h - reach_h - 1) / stride_h + 1;
    out_width = (width + 2 * pad_w - reach_w - 1) / stride_w + 1;
    blocks = ceil_div(channels, kLanes);
    rows = out_height + reach_h / stride_h;
    columns = out_width + reach_w / stride_w;
    // The padding right of a row can be that left of the next one.
    if (stride_w == 1) columns -= std::min(pad_w, reach_w);
    plane = rows * columns * kLanes;
    image = blocks * stride_h * stride_w * plane;
  }

  // Vectors that may be read behind the last image: by the last row's padding, and by a last run
  // that is longer than what is left.
  int64_t behind() const { return (pad_w + kLongest) * kLanes; }

  // Fill one row of one block of channels, in all phases of the columns.
  void pack_row(const float* x, float* packed, int64_t block, int64_t padded_row) const {
    const int64_t row = padded_row - pad_h, first = block * kLanes;
    const int64_t present = std::min(kLanes, channels - first);
    for (int64_t phase = 0; phase < stride_w; ++phase) {
      const int64_t phases = (block * stride_h + padded_row % stride_h) * stride_w + phase;
      float* target = packed + phases * plane + padded_row / stride_h * columns * kLanes;
      for (int64_t column = 0; column < columns; ++column, target += kLanes) {
        const int64_t from = column * stride_w + phase - pad_w;
        if (row < 0 || row >= height || from < 0 || from >= width) {
          std::memset(target, 0, sizeof(float) * kLanes);
          continue;
        }
        const float* source = x + first * channel_step + row * row_step + from * column_step;
        if (channel_step == 1 && present == kLanes) {
          std::memcpy(target, source, sizeof(float) * kLanes);
        } else {
          for (int64_t c = 0; c < present; ++c) target[c] = source[c * channel_step];
          for (int64_t c = present; c < kLanes; ++c) target[c] = 0;
        }
      }
    }
  }

  // Where a unit of the weight finds its input, from that of an output pixel on.
  int64_t offset(int64_t channel, int64_t y, int64_t x) const {
    const int64_t phase = (channel / kLanes * stride_h + y % stride_h) * stride_w + x % stride_w;
    return phase * plane + (y / stride_h * columns + x / stride_w) * kLanes + channel % kLanes;
  }
};

// Threads take the next task when they are done with one: tasks differ, and so do busy cores.
template <typename F>
void for_each_task(int64_t tasks, const F& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i);
  });
}

// input     (N, C, H, W), of any strides
// units     (K, UNIT, 16): the units that are left, by row of blocks; lanes are output channels
// positions (K, 3): first input channel of each unit, and its place in the kernel
// ends      (output channels / 16 + 1): where each row of blocks begins and ends in K
// bias      (output channels / 16 * 16), zeros if there is none
at::Tensor block_sparse_conv2d(const at::Tensor& input, const at::Tensor& units,
                               const at::Tensor& positions, const at::Tensor& ends,
                               const at::Tensor& bias, int64_t out_channels, at::IntArrayRef kernel,
                               at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, bool channels_last) {
  TORCH_CHECK(input.dim() == 4 && input.scalar_type() == at::kFloat,
              "executor: expected a float32 batch of images.");
  const Geometry g(input, kernel, stride, padding, dilation);
  const int64_t images = input.size(0), unit = units.size(1), out_blocks = ends.size(0) - 1;
  auto output = at::empty({images, out_channels, g.out_height, g.out_width}, input.options(),
                          channels_last ? at::MemoryFormat::ChannelsLast
                                        : at::MemoryFormat::Contiguous);

  std::vector<int64_t> offsets(units.size(0));
  const int64_t* position = positions.const_data_ptr<int64_t>();
  for (size_t k = 0; k < offsets.size(); ++k, position += 3)
    offsets[k] = g.offset(position[0], position[1] * dilation[0], position[2] * dilation[1]);

  const int64_t pixels = (g.out_height - 1) * g.columns + g.out_width;
  const int length = best_length(pixels);
  const Run run = unit == 8 ? run_of_length<8>(length) : run_of_length<1>(length);
  const int64_t runs = ceil_div(pixels, length);
  const int64_t chunk = std::clamp<int64_t>(kChunkFloats / (g.channels * length), 1, runs);
  const int64_t chunks = ceil_div(runs, chunk);
  const int64_t threads = at::get_num_threads();

  const float* x = input.const_data_ptr<float>();
  const float* w = units.const_data_ptr<float>();
  const float* b = bias.const_data_ptr<float>();
  const int64_t* end = ends.const_data_ptr<int64_t>();
  float* y = output.data_ptr<float>();

  const auto convolve = [&](int64_t first, int64_t count) {
    auto buffer = at::empty({count * g.image + g.behind()}, input.options());
    float* packed = buffer.data_ptr<float>();
    std::memset(packed + count * g.image, 0, sizeof(float) * g.behind());
    const int64_t rows = g.rows * g.stride_h;
    const int64_t grain = ceil_div(kChunkFloats, g.columns * g.stride_w * kLanes);
    at::parallel_for(0, count * rows * g.blocks, grain, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t n = i / g.blocks / rows;
        g.pack_row(x + (first + n) * input.stride(0), packed + n * g.image,
                   i % g.blocks, i / g.blocks % rows);
      }
    });
    for_each_task(count * chunks * out_blocks, [&](int64_t task) {
      const int64_t block = task % out_blocks, part = task / out_blocks % chunks;
      const int64_t n = task / out_blocks / chunks;
      const int64_t lanes = std::min(kLanes, out_channels - block * kLanes);
      const int64_t lane_step = channels_last ? 1 : g.out_height * g.out_width;
      const int64_t pixel_step = channels_last ? out_channels : 1;
      float* image = y + (first + n) * g.out_height * g.out_width * out_channels +
                     block * kLanes * lane_step;
      alignas(64) float sums[kLongest * kLanes];
      for (int64_t i = part * chunk; i < std::min(runs, (part + 1) * chunk); ++i) {
        run(packed + n * g.image + i * length * kLanes, offsets.data() + end[block],
            w + end[block] * unit * kLanes, end[block + 1] - end[block], b + block * kLanes, sums);
        int64_t row = i * length / g.columns, column = i * length % g.columns;
        for (int p = 0; p < length && row < g.out_height; ++p) {
          if (column < g.out_width) {
            float* target = image + (row * g.out_width + column) * pixel_step;
            const float* source = sums + p * kLanes;
            if (channels_last && lanes == kLanes) {
              std::memcpy(target, source, sizeof(float) * kLanes);
            } else {
              for (int64_t l = 0; l < lanes; ++l) target[l * lane_step] = source[l];
            }
          }
          if (++column == g.columns) column = 0, ++row;
        }
      }
    });
  };

  // With enough images every thread takes some for itself, and waits for nobody between the steps:
  // what is parallel inside is then run by that thread alone.
  const int64_t together = std::min(std::max<int64_t>(kImageFloats / g.image, 1),
                                    std::max<int64_t>(images / threads, 1));
  const int64_t groups = ceil_div(images, together);
  const auto group = [&](int64_t i) {
    convolve(i * together, std::min(together, images - i * together));
  };
  if (groups >= threads) {
    for_each_task(groups, group);
  } else {
    for (int64_t i = 0; i < groups; ++i) group(i);
  }
  return output;
}

}  // namespace

TORCH_LIBRARY(mmsmart_executor, library) {
  library.def(
      "block_sparse_conv2d(Tensor input, Tensor units, Tensor positions, Tensor ends, Tensor bias, "
      "int out_channels, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool "
      "channels_last) -> Tensor");
}

TORCH_LIBRARY_IMPL(mmsmart_executor, CPU, library) {
  library.impl("block_sparse_conv2d", &block_sparse_conv2d);
}
