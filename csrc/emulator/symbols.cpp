#include "symbols.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>

#include <filesystem>
#include <map>

namespace tim::emulator {
namespace {

std::string quoted(const std::string& argument) {
    std::string result = "'";
    for (const char c : argument) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
    return result + "'";
}

std::vector<std::string> lines_of(const std::string& command) {
    std::vector<std::string> lines;
    FILE* const pipe = popen(command.c_str(), "r");
    if (pipe == nullptr) return lines;
    std::string line;
    for (int c = fgetc(pipe); c != EOF; c = fgetc(pipe)) {
        if (c != '\n') {
            line += char(c);
            continue;
        }
        lines.push_back(line);
        line.clear();
    }
    pclose(pipe);
    return lines;
}

std::vector<Frame> look_up(const void* code) {
    std::vector<Frame> found;
    Dl_info info;
    if (dladdr(code, &info) == 0 || info.dli_fname == nullptr) return found;
    const uintptr_t offset =
        reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(info.dli_fbase);
    char address[32];
    snprintf(address, sizeof(address), "0x%zx", size_t(offset));
    // Pairs of lines: function, file:line.
    const std::vector<std::string> lines = lines_of(
        "addr2line -C -f -i -e " + quoted(info.dli_fname) + " " + address + " 2>/dev/null");
    for (size_t i = 0; i + 1 < lines.size(); i += 2) {
        std::string place = lines[i + 1].substr(0, lines[i + 1].find(' '));
        const size_t colon = place.rfind(':');
        if (colon == std::string::npos || place[0] == '?') break;
        const int line = atoi(place.c_str() + colon + 1);
        found.push_back({lines[i], place.substr(0, colon), line});
    }
    return found;
}

// Without namespaces and parameters, which make names of templates unreadably long.
std::string short_name(std::string name) {
    for (const char* scope : {"tim::cuda::", "tim::math::", "(anonymous namespace)::"}) {
        for (size_t at = name.find(scope); at != std::string::npos; at = name.find(scope))
            name.erase(at, std::string(scope).size());
    }
    int depth = 0;
    for (size_t i = 0; i < name.size(); ++i) {
        if (name[i] == '<') ++depth;
        if (name[i] == '>') --depth;
        if (name[i] == '(' && depth == 0 && i > 0) {
            name.resize(i);
            break;
        }
    }
    if (name.compare(0, 5, "void ") == 0) name.erase(0, 5);
    return name;
}

std::string short_path(const std::string& path) {
    const std::string whole = std::filesystem::path(path).lexically_normal().string();
    for (const char* folder : {"/csrc/", "/tests/"}) {
        const size_t at = whole.rfind(folder);
        if (at != std::string::npos) return whole.substr(at + 1);
    }
    return whole;
}

}  // namespace

const std::vector<Frame>& frames(const void* code) {
    static std::map<const void*, std::vector<Frame>> known;
    const auto found = known.find(code);
    if (found != known.end()) return found->second;
    // A return address belongs to the instruction after the call.
    return known[code] = look_up(static_cast<const char*>(code) - 1);
}

std::string describe(const void* code) {
    std::string result;
    for (const Frame& frame : frames(code)) {
        const std::string path = short_path(frame.file);
        if (path.compare(0, 14, "csrc/emulator/") == 0) continue;
        result += (result.empty() ? "at " : ", ") + path + ":" + std::to_string(frame.line);
    }
    return result;
}

std::string function_name(const void* function) {
    const std::vector<Frame>& found = frames(static_cast<const char*>(function) + 1);
    return found.empty() ? "" : short_name(found.back().function);
}

}  // namespace tim::emulator
