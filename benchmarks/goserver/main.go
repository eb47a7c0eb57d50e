// The benchmarks' HTTP/2 server: Go's net/http over TLS, no dependencies.
//
//	POST /answer?size=500&wait=2s            reads the body, waits, answers with size bytes of JSON
//	POST /sink                               reads the body, answers with its length
//	GET  /bytes?size=50331648                size bytes
//	GET  /events?count=20&interval=20ms      Server-Sent Events, each flushed, each bearing the time it was sent
//
// A second listener, plain HTTP/1.1, has GET /stats, GET /addresses (all that are listened on: with -listeners there are
// many origins) and POST /close, which closes all connections. The addresses of the first and of this one are printed as
// one line of JSON; the server ends when its standard input does.
package main

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const chunk = 256 << 10

var (
	connections atomic.Int64
	requests    atomic.Int64
	noise       = make([]byte, chunk)

	openLock sync.Mutex
	open     = map[net.Conn]bool{}
)

func number(r *http.Request, name string, fallback int) int {
	if n, err := strconv.Atoi(r.URL.Query().Get(name)); err == nil {
		return n
	}
	return fallback
}

func pause(r *http.Request, name string) time.Duration {
	d, _ := time.ParseDuration(r.URL.Query().Get(name))
	return d
}

// answer is a request and its response, such as an API's.
func answer(w http.ResponseWriter, r *http.Request) {
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return
	}
	if wait := pause(r, "wait"); wait > 0 {
		select {
		case <-time.After(wait):
		case <-r.Context().Done():
			return
		}
	}
	size := max(number(r, "size", 500), 20)
	body := append(append([]byte(`{"text":"`), bytes.Repeat([]byte("x"), size-11)...), `"}`...)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Write(body)
}

// sink reads what is uploaded as fast as it comes.
func sink(w http.ResponseWriter, r *http.Request) {
	size, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, r.Body, make([]byte, chunk))
	if err == nil {
		fmt.Fprint(w, size)
	}
}

// download sends many bytes as fast as flow control lets it.
func download(w http.ResponseWriter, r *http.Request) {
	size := number(r, "size", 1<<20)
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.Itoa(size))
	for size > 0 {
		n := min(size, chunk)
		if _, err := w.Write(noise[:n]); err != nil {
			return
		}
		size -= n
	}
}

// events flushes after each event, so that each is a DATA frame of its own, as tokens of a language model are.
func events(w http.ResponseWriter, r *http.Request) {
	interval := pause(r, "interval")
	w.Header().Set("Content-Type", "text/event-stream")
	flusher := w.(http.Flusher)
	flusher.Flush()
	var event []byte
	for i := range number(r, "count", 1) {
		if interval > 0 {
			time.Sleep(interval)
		}
		event = append(event[:0], `data: {"i":`...)
		event = strconv.AppendInt(event, int64(i), 10)
		event = append(event, `,"ns":`...)
		event = strconv.AppendInt(event, time.Now().UnixNano(), 10)
		event = append(event, `,"delta":"token"}`+"\n\n"...)
		if _, err := w.Write(event); err != nil {
			return
		}
		flusher.Flush()
	}
}

func stats(w http.ResponseWriter, _ *http.Request) {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	cpu := time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds()
	json.NewEncoder(w).Encode(map[string]any{
		"connections": connections.Load(), "requests": requests.Load(), "cpu_seconds": cpu, "procs": runtime.GOMAXPROCS(0),
	})
}

// closeAll ends every connection as a server does that stops: at once, but with the notice of TLS.
func closeAll(http.ResponseWriter, *http.Request) {
	openLock.Lock()
	defer openLock.Unlock()
	for c := range open {
		c.Close()
	}
}

func follow(c net.Conn, state http.ConnState) {
	openLock.Lock()
	defer openLock.Unlock()
	switch state {
	case http.StateNew:
		connections.Add(1)
		open[c] = true
	case http.StateClosed:
		delete(open, c)
	}
}

// counted counts requests, and refuses those that came over anything but HTTP/2 unless they are wanted.
func counted(next http.Handler, http1 bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 && !http1 {
			http.Error(w, "HTTP/2 only", http.StatusHTTPVersionNotSupported)
			return
		}
		requests.Add(1)
		next.ServeHTTP(w, r)
	})
}

func listen() net.Listener {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	return listener
}

func main() {
	cert := flag.String("cert", "", "certificate chain and private key, one PEM `file`")
	streams := flag.Int("streams", 8192, "MAX_CONCURRENT_STREAMS")
	listeners := flag.Int("listeners", 1, "addresses to listen on")
	http1 := flag.Bool("http1", false, "answer HTTP/1.1 too")
	gather := flag.Bool("gather", false, "write with one system call what is ready to be written")
	flag.Parse()
	pair, err := tls.LoadX509KeyPair(*cert, *cert)
	if err != nil {
		log.Fatal(err)
	}
	rand.New(rand.NewSource(1)).Read(noise)

	mux := http.NewServeMux()
	mux.HandleFunc("POST /answer", answer)
	mux.HandleFunc("POST /sink", sink)
	mux.HandleFunc("GET /bytes", download)
	mux.HandleFunc("GET /events", events)
	server := &http.Server{
		Handler:   counted(mux, *http1),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}},
		HTTP2:     &http.HTTP2Config{MaxConcurrentStreams: *streams},
		ErrorLog:  log.New(io.Discard, "", 0), // clients that end in the middle of things are part of the day
		ConnState: follow,
	}
	addresses := make([]string, *listeners)
	for i := range addresses {
		listener := listen()
		addresses[i] = listener.Addr().String()
		if *gather {
			listener = gatheringListener{listener}
		}
		go func() { log.Fatal(server.ServeTLS(listener, "", "")) }()
	}
	aside := http.NewServeMux()
	aside.HandleFunc("GET /stats", stats)
	aside.HandleFunc("GET /addresses", func(w http.ResponseWriter, _ *http.Request) { json.NewEncoder(w).Encode(addresses) })
	aside.HandleFunc("POST /close", closeAll)
	side := listen()
	go func() { log.Fatal(http.Serve(side, aside)) }()
	json.NewEncoder(os.Stdout).Encode(map[string]string{"https": addresses[0], "stats": side.Addr().String()})
	io.Copy(io.Discard, os.Stdin)
}
