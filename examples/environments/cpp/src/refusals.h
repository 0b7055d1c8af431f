// What a caller is told who asks for what is not to be had.
#pragma once

#include <grpcpp/grpcpp.h>

#include <string>

namespace calculator {

inline constexpr char kName[] = "calculator";

// What a caller sent, shortened: it comes back in a trailer, and those have to stay small.
inline std::string Quoted(const std::string& value) { return "'" + value.substr(0, 60) + "'"; }

inline grpc::Status Invalid(const std::string& message) {
  return {grpc::StatusCode::INVALID_ARGUMENT, message};
}

inline grpc::Status NotFound(const std::string& field, const std::string& value) {
  return {grpc::StatusCode::NOT_FOUND, field + ": there is no " + Quoted(value)};
}

inline grpc::Status Stopping() {
  return {grpc::StatusCode::UNAVAILABLE, "the environment is stopping"};
}

inline grpc::Status CheckName(const std::string& environment) {
  if (environment.empty() || environment == kName) return grpc::Status::OK;
  return NotFound("environment", environment);
}

}  // namespace calculator
