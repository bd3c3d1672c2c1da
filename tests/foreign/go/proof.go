// Calls the server as any Go program would: Debian's gRPC, stubs by Debian's protoc-gen-go, nothing of ours.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	chromarpcv1 "chromarpc/v1"
)

// codec is what gRPC does by itself where it is younger than Debian's, which knows only an older kind of message.
type codec struct{}

func (codec) Marshal(message interface{}) ([]byte, error) {
	return proto.Marshal(message.(proto.Message))
}
func (codec) Unmarshal(data []byte, message interface{}) error {
	return proto.Unmarshal(data, message.(proto.Message))
}
func (codec) Name() string { return "proto" }

func check(holds bool, what string) {
	if !holds {
		fmt.Fprintln(os.Stderr, "Go: "+what)
		os.Exit(1)
	}
}

func request(side, steps int32) *chromarpcv1.GenerateRequest {
	return &chromarpcv1.GenerateRequest{
		Model: proto.String("chroma-mini"),
		Prompts: []*chromarpcv1.Prompt{{
			Prompt:      proto.String("a red circle"),
			Width:       proto.Int32(side),
			Height:      proto.Int32(side),
			SampleSteps: proto.Int32(steps),
		}},
	}
}

// follow reads a stream to its end and tells each event.
func follow(stream chromarpcv1.GenerationService_GenerateClient, use func(*chromarpcv1.JobEvent)) error {
	for {
		response, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		use(response.GetEvent())
	}
}

func main() {
	check(len(os.Args) == 2, "usage: proof HOST:PORT")
	encoding.RegisterCodec(codec{})
	connection, err := grpc.Dial(os.Args[1], grpc.WithInsecure())
	check(err == nil, "no connection")
	defer connection.Close()
	generation := chromarpcv1.NewGenerationServiceClient(connection)
	ignore := func(*chromarpcv1.JobEvent) {}

	stream, err := generation.Generate(context.Background(), request(64, 3))
	check(err == nil, "no stream")
	steps, announced, received := 0, uint64(0), uint64(0)
	var first, last *chromarpcv1.JobEvent
	err = follow(stream, func(event *chromarpcv1.JobEvent) {
		if first == nil {
			first = event
		}
		last = event
		if event.GetStep() != nil {
			steps++
		}
		announced += event.GetImageHeader().GetSizeBytes()
		received += uint64(len(event.GetImageChunk().GetData()))
	})
	check(err == nil, "a generation failed")
	check(first.GetAccepted() != nil && last.GetCompleted() != nil, "events out of order")
	check(steps == 3 && announced > 0 && announced == received, "steps or bytes are missing")
	fmt.Printf("Go: %d steps, an image of %d bytes\n", steps, received)

	cancelled, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err = generation.Generate(cancelled, request(512, 150))
	check(err == nil, "no stream")
	err = follow(stream, func(event *chromarpcv1.JobEvent) {
		if event.GetStep() != nil {
			cancel()
		}
	})
	check(status.Code(err) == codes.Canceled, "not cancelled")
	stream, err = generation.Generate(context.Background(), request(64, 1))
	check(err == nil && follow(stream, ignore) == nil, "the device is not free")
	fmt.Println("Go: cancelled at its first step")

	stream, err = generation.Generate(context.Background(), request(63, 1))
	check(err == nil, "no stream")
	refused := status.Convert(follow(stream, ignore))
	check(refused.Code() == codes.InvalidArgument, "another status")
	reason, field := "", ""
	for _, detail := range refused.Details() {
		switch told := detail.(type) {
		case *errdetails.ErrorInfo:
			reason = told.GetReason()
		case *errdetails.BadRequest:
			field = told.GetFieldViolations()[0].GetField()
		}
	}
	check(reason == "INVALID_PARAMETER" && field == "prompts.0.width", "no reason or field: "+reason+" "+field)
	fmt.Println("Go: an error with its field")

	limited, free := context.WithTimeout(context.Background(), 700*time.Millisecond)
	defer free()
	stream, err = generation.Generate(limited, request(512, 150))
	check(err == nil && status.Code(follow(stream, ignore)) == codes.DeadlineExceeded, "no deadline")
	fmt.Println("Go: a deadline")
}
