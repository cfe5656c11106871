// A model's configuration: the keys of config.json, sections joined by dots.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <variant>

namespace terse {

class Options {
public:
    using Value = std::variant<bool, std::int64_t, double, std::string>;

    explicit Options(std::map<std::string, Value> values) : values_(std::move(values)) {}

    const std::string& text(const std::string& key) const { return get<std::string>(key); }
    bool flag(const std::string& key) const { return get<bool>(key); }
    double number(const std::string& key) const { return get<double>(key); }

    // A size: an integer in [least, 2^30].
    int size(const std::string& key, int least = 1) const {
        const std::int64_t value = get<std::int64_t>(key);
        if (value < least || value > (1 << 30)) {
            throw std::invalid_argument("the configuration's " + key + " = " + std::to_string(value) + " is out of range");
        }
        return static_cast<int>(value);
    }

private:
    template <typename T>
    const T& get(const std::string& key) const {
        const auto found = values_.find(key);
        if (found == values_.end() || !std::holds_alternative<T>(found->second)) {
            throw std::invalid_argument("the configuration has no " + key + " of the right type");
        }
        return std::get<T>(found->second);
    }

    std::map<std::string, Value> values_;
};

}  // namespace terse
