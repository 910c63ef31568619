"""Talks to a Headgate router over gRPC, first with the client, then with the generated stubs.

    python docs/examples/grpc_client.py [ADDRESS] [API_KEY]

ADDRESS is the launcher's gRPC address: by default the HTTP port + 1, so localhost:3001.
"""

from __future__ import annotations

import sys

import grpc

from headgate import Client, SamplingParams
from headgate.proto import router_pb2, router_pb2_grpc
from headgate.router.errors import RouterError, from_rpc_error


def with_the_client(address: str, api_key: str) -> None:
    with Client(address, api_key=api_key) as client:
        info = client.info()
        print(f"model: {info.model_id}, up to {info.max_total_tokens} tokens")

        spans = client.tokenize("The capital of Japan is")
        print(f"tokens: {[span.text for span in spans]}")

        answer = client.generate("The capital of Japan is", max_new_tokens=8)
        print(f"answer: {answer.text!r} ({answer.finish_reason})")

        params = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=16)
        print("stream: ", end="")
        for piece in client.stream("Once upon a time", params):
            print(piece.text, end="", flush=True)
        print()

        try:
            client.generate("Hello", max_new_tokens=0)
        except RouterError as error:
            print(f"refused: {error.error_type} ({error.http_status}): {error.message}")


def with_the_stubs(address: str, api_key: str) -> None:
    metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    with grpc.insecure_channel(address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        request = router_pb2.GenerateRequest(
            text="The capital of France is",
            parameters=router_pb2.Parameters(max_new_tokens=8, top_n_tokens=2),
        )
        try:
            for event in stub.GenerateStream(request, metadata=metadata):
                kind = event.WhichOneof("event")
                if kind == "accepted":
                    print(f"accepted: {event.accepted.input_tokens} prompt tokens")
                elif kind == "tokens":
                    for token in event.tokens.tokens:
                        others = [other.text for other in token.top]
                        print(f"token: {token.id} {token.text!r} of {others}")
                elif kind == "finished":
                    print(f"finished: {event.finished.generated_text!r}")
        except grpc.RpcError as error:
            print(f"failed: {from_rpc_error(error)}")


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "localhost:3001"
    api_key = sys.argv[2] if len(sys.argv) > 2 else ""
    with_the_client(address, api_key)
    with_the_stubs(address, api_key)


if __name__ == "__main__":
    main()
