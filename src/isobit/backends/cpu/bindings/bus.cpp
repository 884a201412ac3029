// A file that becomes shorter while it is mapped: whoever reads what is gone gets SIGBUS. In a
// process of our own, one line names the file and the exit code is that of a refused model.

#include <signal.h>
#include <string.h>
#include <unistd.h>

#include <atomic>

#include "module.h"

namespace {

constexpr int MOST = 256, REFUSED = 3;

struct Mapping {
    std::atomic<uintptr_t> first{0}, end{0};
    char line[512];
    size_t length;
};
Mapping mappings[MOST];
struct sigaction previous;
bool installed = false;

void handle(int signal, siginfo_t* info, void* context) {
    const uintptr_t at = (uintptr_t)info->si_addr;
    for (const Mapping& m : mappings)
        if (m.first.load() <= at && at < m.end.load()) {
            if (write(STDERR_FILENO, m.line, m.length) < 0) _exit(REFUSED);
            _exit(REFUSED);
        }
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
        sigaction(signal, &previous, nullptr);  // and the fault comes again
    } else {
        previous.sa_handler(signal);
    }
}

// What the process says when memory of this array cannot be read; only the first so many have it.
void name_mapping(const Array<const uint8_t, 1>& data, const std::string& line) {
    for (Mapping& m : mappings) {
        if (m.end.load()) continue;
        m.length = std::min(line.size(), sizeof m.line - 1);
        memcpy(m.line, line.data(), m.length);
        m.line[m.length++] = '\n';
        m.first = (uintptr_t)data.data();
        m.end = (uintptr_t)data.data() + data.size();
        return;
    }
}

void forget_mapping(const Array<const uint8_t, 1>& data) {
    for (Mapping& m : mappings)
        if (m.end.load() && m.first.load() == (uintptr_t)data.data())
            m.end = 0;  // alone: memory before `first` never belonged to it
}

void exit_on_bus_error() {
    if (installed) return;
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    installed = sigaction(SIGBUS, &action, &previous) == 0;
}

}  // namespace

void bind_bus(nb::module_& m) {
    m.def("name_mapping", &name_mapping);
    m.def("forget_mapping", &forget_mapping);
    m.def("exit_on_bus_error", &exit_on_bus_error);
}
