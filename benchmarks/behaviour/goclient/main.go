// Go's net/http as a client that is told what to do: see worker.py, whose orders and events these are.
package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

type order struct {
	Do     string
	ID     int
	Method string
	URL    string
	Upload int
}

var (
	began = time.Now()
	lock  sync.Mutex
	zero  float64
)

// tell prints one event. Go hands out no readings of the monotonic clock, so one was passed in by what it differs from
// the wall clock; what has gone by since then is measured.
func tell(event string, facts map[string]any) {
	lock.Lock()
	defer lock.Unlock()
	facts["event"] = event
	facts["at"] = zero + time.Since(began).Seconds()
	line, _ := json.Marshal(facts)
	fmt.Println(string(line))
}

func fetch(client *http.Client, o order) (int, int64, error) {
	var body io.Reader
	if o.Upload > 0 {
		body = bytes.NewReader(make([]byte, o.Upload))
	}
	request, err := http.NewRequest(o.Method, o.URL, body)
	if err != nil {
		return 0, 0, err
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, 0, err
	}
	defer response.Body.Close()
	size, err := io.Copy(io.Discard, response.Body)
	return response.StatusCode, size, err
}

func innermost(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}

func main() {
	ca := flag.String("ca", "", "PEM file")
	idle := flag.Float64("idle", 0, "seconds")
	ping := flag.Float64("ping", 0, "seconds")
	connect := flag.Float64("connect", 0, "seconds")
	read := flag.Float64("read", 0, "seconds")
	offset := flag.Float64("clock", 0, "wall clock minus monotonic clock, in seconds")
	flag.Parse()
	zero = float64(began.UnixNano())/1e9 - *offset
	seconds := func(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

	pem, err := os.ReadFile(*ca)
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	client := &http.Client{Transport: &http.Transport{
		ForceAttemptHTTP2:     true,
		TLSClientConfig:       &tls.Config{RootCAs: roots},
		DialContext:           (&net.Dialer{Timeout: seconds(*connect)}).DialContext,
		TLSHandshakeTimeout:   seconds(*connect),
		ResponseHeaderTimeout: seconds(*read),
		HTTP2:                 &http.HTTP2Config{SendPingTimeout: seconds(*idle), PingTimeout: seconds(*ping)},
	}}

	tell("ready", map[string]any{})
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var o order
		if err := json.Unmarshal(lines.Bytes(), &o); err != nil {
			log.Fatal(err)
		}
		go func() {
			status, size, err := fetch(client, o)
			if err != nil {
				tell("error", map[string]any{"id": o.ID, "type": fmt.Sprintf("%T", innermost(err)), "message": err.Error()})
			} else {
				tell("answer", map[string]any{"id": o.ID, "status": status, "size": size})
			}
		}()
	}
}
