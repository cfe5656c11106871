// The Python side: the only file that knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "cores.h"
#include "isa.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
    m.def("isa", [] { return terse::name(terse::active_isa()); });
    m.def("supported_isas", [] {
        std::vector<std::string_view> names;
        for (const terse::Isa isa : terse::supported_isas()) {
            names.push_back(terse::name(isa));
        }
        return names;
    });
    m.def("physical_cores", &terse::physical_cores, nb::arg("root") = "/");
}
