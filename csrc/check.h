// Argument checks of native entries: a failed one becomes a ValueError in Python.
#pragma once

#include <sstream>
#include <stdexcept>

#define MM_CHECK(condition, message)              \
  do {                                            \
    if (!(condition)) {                           \
      std::ostringstream mm_text;                 \
      mm_text << message;                         \
      throw std::invalid_argument(mm_text.str()); \
    }                                             \
  } while (false)
