// y+- = x (W +- c z)^T + b on the CPU, by panels of rows of W. W is only read. Memory has one panel of z at a time.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "zo.h"

namespace leanops {
namespace zo {

Distribution distribution_of(const std::string& name, const char* op);
uint64_t seed_of(const torch::stable::Tensor& seed);
const Kernels& active_kernels();

std::tuple<torch::stable::Tensor, torch::stable::Tensor> zo_linear(
    torch::stable::Tensor x, std::optional<torch::stable::Tensor> x_minus, torch::stable::Tensor weight,
    std::optional<torch::stable::Tensor> bias, torch::stable::Tensor seed, double scale, int64_t tensor_id,
    int64_t offset, std::string distribution);

}  // namespace zo
}  // namespace leanops
