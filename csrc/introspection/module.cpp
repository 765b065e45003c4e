// hgc_kernels._native: what the compiled libraries are, asked of the libraries themselves.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "build_info.h"

namespace py = pybind11;

namespace {

class Library {
 public:
  explicit Library(const std::string& path)
      : handle_(dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL)) {
    if (!handle_) throw py::import_error(dlerror());
  }
  ~Library() { dlclose(handle_); }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  template <typename Function>
  Function* find(const char* name) const {
    void* symbol = dlsym(handle_, name);
    if (!symbol) throw py::attribute_error(dlerror());
    return reinterpret_cast<Function*>(symbol);
  }

 private:
  void* handle_;
};

py::object parse(const char* json) { return py::module_::import("json").attr("loads")(json); }

py::object build_info() { return parse(HGC_BUILD_INFO); }

py::object library_info(const std::string& path) {
  return parse(Library(path).find<const char*()>("hgc_build_info")());
}

std::string cpu_vector_set(const std::string& path) {
  return Library(path).find<const char*()>("hgc_cpu_isa")();
}

py::list kernel_attributes(const std::string& path) {
  const Library library(path);
  auto* ask =
      library.find<int(int, const char**, int*, int64_t*, int64_t*, int*)>("hgc_kernel_attributes");
  py::list kernels;
  for (int index = 0;; ++index) {
    const char* name = nullptr;
    int registers = 0;
    int max_threads = 0;
    int64_t shared_bytes = 0;
    int64_t local_bytes = 0;
    const int status = ask(index, &name, &registers, &shared_bytes, &local_bytes, &max_threads);
    if (status < 0) throw std::runtime_error(name);
    if (status > 0) return kernels;
    py::dict kernel;
    kernel["name"] = name;
    kernel["registers"] = registers;
    kernel["shared_bytes"] = shared_bytes;
    kernel["local_bytes"] = local_bytes;
    kernel["max_threads"] = max_threads;
    kernels.append(kernel);
  }
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "What the compiled kernel libraries are.";
  m.def("build_info", &build_info, "How this module was built.");
  m.def("library_info", &library_info, py::arg("path"), "How the op library at `path` was built.");
  m.def("cpu_vector_set", &cpu_vector_set, py::arg("path"),
        "The vector set that the CPU library uses here.");
  m.def("kernel_attributes", &kernel_attributes, py::arg("path"),
        "Registers, shared and local bytes and threads of each CUDA kernel. Raises RuntimeError "
        "without a GPU.");
}
