// Calls the server as any C++ program would: Debian's gRPC, stubs by Debian's protoc, nothing of ours.
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>

#include "chromarpc/v1/generation_service.grpc.pb.h"
#include "chromarpc/v1/job_service.grpc.pb.h"

using namespace chromarpc::v1;

namespace {

void Check(bool holds, const std::string& what) {
  if (holds) return;
  std::cerr << "C++: " << what << std::endl;
  std::exit(1);
}

GenerateRequest Request(int side, int steps) {
  GenerateRequest request;
  request.set_model("chroma-mini");
  Prompt* prompt = request.add_prompts();
  prompt->set_prompt("a red circle");
  prompt->set_width(side);
  prompt->set_height(side);
  prompt->set_sample_steps(steps);
  return request;
}

}  // namespace

int main(int argc, char** argv) {
  Check(argc == 2, "usage: proof HOST:PORT");
  auto channel = grpc::CreateChannel(argv[1], grpc::InsecureChannelCredentials());
  auto generation = GenerationService::NewStub(channel);

  {
    grpc::ClientContext context;
    auto stream = generation->Generate(&context, Request(64, 3));
    GenerateResponse response;
    int steps = 0;
    JobEvent::EventCase first = JobEvent::EVENT_NOT_SET, last = JobEvent::EVENT_NOT_SET;
    std::size_t announced = 0, received = 0;
    while (stream->Read(&response)) {
      last = response.event().event_case();
      if (first == JobEvent::EVENT_NOT_SET) first = last;
      steps += response.event().has_step();
      if (response.event().has_image_header()) announced = response.event().image_header().size_bytes();
      if (response.event().has_image_chunk()) received += response.event().image_chunk().data().size();
    }
    Check(stream->Finish().ok(), "a generation failed");
    Check(first == JobEvent::kAccepted && last == JobEvent::kCompleted, "events out of order");
    Check(steps == 3 && announced > 0 && announced == received, "steps or bytes are missing");
    std::cout << "C++: " << steps << " steps, an image of " << received << " bytes" << std::endl;
  }
  {
    grpc::ClientContext context;
    auto stream = generation->Generate(&context, Request(512, 150));
    GenerateResponse response;
    while (stream->Read(&response))
      if (response.event().has_step()) context.TryCancel();
    Check(stream->Finish().error_code() == grpc::StatusCode::CANCELLED, "not cancelled");
    grpc::ClientContext next;
    auto after = generation->Generate(&next, Request(64, 1));
    while (after->Read(&response)) {
    }
    Check(after->Finish().ok(), "the device is not free");
    std::cout << "C++: cancelled at its first step" << std::endl;
  }
  {
    grpc::ClientContext context;
    auto stream = generation->Generate(&context, Request(63, 1));
    GenerateResponse response;
    Check(!stream->Read(&response), "an event although the request is wrong");
    grpc::Status status = stream->Finish();
    Check(status.error_code() == grpc::StatusCode::INVALID_ARGUMENT, "another status");
    for (const char* part : {"INVALID_PARAMETER", "prompts.0.width"})
      Check(status.error_details().find(part) != std::string::npos, std::string("no ") + part + " in the details");
    std::cout << "C++: an error with its field" << std::endl;
  }
  {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(700));
    auto stream = generation->Generate(&context, Request(512, 150));
    GenerateResponse response;
    while (stream->Read(&response)) {
    }
    Check(stream->Finish().error_code() == grpc::StatusCode::DEADLINE_EXCEEDED, "no deadline");
    std::cout << "C++: a deadline" << std::endl;
  }
}
