// Named arrays that somebody else owns: the weights, as they lie in a packed file.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace terse {

struct Tensor {
    const void* data;
    Dtype dtype;
    std::vector<std::int64_t> shape;
};

class Tensors {
public:
    void add(const std::string& name, Tensor tensor) { tensors_.insert_or_assign(name, std::move(tensor)); }

    // The data of a tensor. Throws std::invalid_argument when it is missing or is not what the model needs.
    const void* get(const std::string& name, Dtype dtype, const std::vector<std::int64_t>& shape) const {
        const auto found = tensors_.find(name);
        if (found == tensors_.end()) {
            throw std::invalid_argument("the weights have no " + name);
        }
        if (found->second.dtype != dtype || found->second.shape != shape) {
            throw std::invalid_argument("the weights' " + name + " has another type or shape than the model needs");
        }
        return found->second.data;
    }

    const float* floats(const std::string& name, const std::vector<std::int64_t>& shape) const {
        return static_cast<const float*>(get(name, Dtype::f32, shape));
    }

private:
    std::map<std::string, Tensor> tensors_;
};

}  // namespace terse
