package main

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"
)

type wireKey struct{}

func withWire(c context.Context, conn net.Conn) context.Context {
	return context.WithValue(c, wireKey{}, conn.(*tls.Conn).NetConn())
}

// http1Handler serves by net/http those who don't speak HTTP/2, if they are wanted.
func http1Handler(wanted bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !wanted {
			http.Error(w, "HTTP/2 only", http.StatusHTTPVersionNotSupported)
			return
		}
		requests.Add(1)
		received, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r.Body, make([]byte, chunk))
		if err != nil {
			return
		}
		answer, wait := respond(r.Method, r.RequestURI, int(received))
		if !sleep(r, wait) {
			return
		}
		w.Header().Set("Content-Type", answer.contentType)
		if answer.length >= 0 {
			w.Header().Set("Content-Length", strconv.Itoa(answer.length))
		}
		w.WriteHeader(answer.status)
		send(w, r, answer)
	})
}

// send writes a body, as HTTP/2's writer does: with few system calls, unless there are pauses.
func send(w http.ResponseWriter, r *http.Request, answer response) {
	below := r.Context().Value(wireKey{}).(*wire)
	var piece []byte
	for done := false; !done; {
		if pause := answer.body.pause(); pause > 0 {
			below.release()
			if !sleep(r, pause) {
				return
			}
		}
		below.hold()
		piece, done = answer.body.next(piece[:0], chunk)
		if _, err := w.Write(piece); err != nil {
			break
		}
		if answer.flushed {
			w.(http.Flusher).Flush()
		}
	}
	below.release()
}

// sleep says whether the client is still there afterwards.
func sleep(r *http.Request, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	select {
	case <-time.After(d):
		return true
	case <-r.Context().Done():
		return false
	}
}
