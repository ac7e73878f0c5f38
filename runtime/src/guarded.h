// Exceptions to status codes and messages: nothing is thrown across the C interface.
#pragma once

#include <cstdio>
#include <exception>
#include <new>

#include "claq.h"
#include "cuda/driver.h"
#include "exceptions.h"
#include "layer.h"

namespace claq {

template <class Body>
claq_status guarded(char* error, size_t error_size, Body body) noexcept {
  const auto report = [&](const char* message) {
    if (error && error_size) std::snprintf(error, error_size, "%s", message);
  };
  ready_to_throw();
  try {
    body();
    return CLAQ_OK;
  } catch (const InvalidLayer& failure) {
    report(failure.what());
    return CLAQ_INVALID_LAYER;
  } catch (const InvalidArgument& failure) {
    report(failure.what());
    return CLAQ_INVALID_ARGUMENT;
  } catch (const cuda::Error& failure) {
    report(failure.what());
    return CLAQ_UNAVAILABLE;
  } catch (const std::bad_alloc&) {
    report("not enough memory");
  } catch (const std::exception& failure) {
    report(failure.what());
  } catch (...) {
    report("unknown failure");
  }
  return CLAQ_INTERNAL_ERROR;
}

}  // namespace claq
