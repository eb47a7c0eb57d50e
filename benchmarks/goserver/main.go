// The benchmarks' server. Connections are Go's, crypto/tls and net/http, and so is HTTP/1.1; HTTP/2 is spoken by conn.go
// and what is around it, as net/http's own takes more time for many answers than the clients that are measured.
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
	"crypto/tls"
	"encoding/json"
	"flag"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

var (
	connections atomic.Int64
	requests    atomic.Int64

	openLock sync.Mutex
	open     = map[net.Conn]bool{}
)

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
	flag.Parse()
	pair, err := tls.LoadX509KeyPair(*cert, *cert)
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{
		Handler:     http1Handler(*http1),
		TLSConfig:   &tls.Config{Certificates: []tls.Certificate{pair}},
		ErrorLog:    log.New(io.Discard, "", 0), // clients that end in the middle of things are part of the day
		ConnState:   follow,
		ConnContext: withWire,
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){
			"h2": func(_ *http.Server, conn *tls.Conn, _ http.Handler) { serveFrames(conn, *streams) },
		},
	}
	addresses := make([]string, *listeners)
	for i := range addresses {
		listener := listen()
		addresses[i] = listener.Addr().String()
		go func() { log.Fatal(server.ServeTLS(wireListener{listener}, "", "")) }()
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
