// The server of benchmarks/pool.py: Go's net/http, which says GOAWAY and counts how often each path was processed.
//
//	POST /N     over TLS and HTTP/2; every so many requests on a connection, GOAWAY goes with the answer
//	POST /N     over plain HTTP/1.1, for a proxy in front; no goodbyes of its own
//	GET /stats  plain: what was counted since the last time
//
// The addresses are printed as one line of JSON; the server ends when its standard input does.
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"flag"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
)

type key struct{}

var (
	lock        sync.Mutex
	processed   = map[string]int{}
	connections int
	goodbyes    int
)

func process(w http.ResponseWriter, r *http.Request) {
	lock.Lock()
	processed[r.URL.Path]++
	lock.Unlock()
	io.Copy(io.Discard, r.Body)
	w.Header().Set("Content-Type", "text/plain")
	io.WriteString(w, "processed")
}

// retiring says GOAWAY with every so many answers on a connection: it is what "Connection: close" means in HTTP/2.
func retiring(every int64) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Context().Value(key{}).(*atomic.Int64).Add(1) == every {
			lock.Lock()
			goodbyes++
			lock.Unlock()
			w.Header().Set("Connection", "close")
		}
		process(w, r)
	})
}

func stats(w http.ResponseWriter, _ *http.Request) {
	lock.Lock()
	defer lock.Unlock()
	twice := 0
	for _, times := range processed {
		if times > 1 {
			twice++
		}
	}
	json.NewEncoder(w).Encode(map[string]int{
		"processed": len(processed), "twice": twice, "connections": connections, "goodbyes": goodbyes,
	})
	processed, connections, goodbyes = map[string]int{}, 0, 0
}

func main() {
	cert := flag.String("cert", "", "certificate chain and private key, one PEM `file`")
	every := flag.Int64("every", 200, "requests on a connection before its GOAWAY")
	flag.Parse()
	pair, err := tls.LoadX509KeyPair(*cert, *cert)
	if err != nil {
		log.Fatal(err)
	}
	secure := &http.Server{
		Handler:   retiring(*every),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}},
		ErrorLog:  log.New(io.Discard, "", 0),
		ConnContext: func(c context.Context, _ net.Conn) context.Context {
			lock.Lock()
			connections++
			lock.Unlock()
			return context.WithValue(c, key{}, new(atomic.Int64))
		},
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /", process)
	mux.HandleFunc("GET /stats", stats)
	main, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go func() { log.Fatal(secure.ServeTLS(main, "", "")) }()
	go func() { log.Fatal(http.Serve(plain, mux)) }()
	json.NewEncoder(os.Stdout).Encode(map[string]string{"https": main.Addr().String(), "plain": plain.Addr().String()})
	io.Copy(io.Discard, os.Stdin)
}
