package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"keybroker/derive"
)

// keyForm is how a key is written out.
type keyForm struct {
	hex, base64 bool
	out         string
}

func (f *keyForm) flags(c *cobra.Command) {
	c.Flags().BoolVar(&f.hex, "hex", false, "write lower-case hexadecimal and a newline")
	c.Flags().BoolVar(&f.base64, "base64", false, "write base64 and a newline")
	c.Flags().StringVarP(&f.out, "out", "o", "", "write to a new `FILE` of mode 0400; it must not exist; - is standard output")
	c.MarkFlagsMutuallyExclusive("hex", "base64")
}

func newKeyCommand(g *globals) *cobra.Command {
	c := &cobra.Command{Use: "key", Short: "Get a service's key"}
	c.AddCommand(newKeyGetCommand(g), newKeyDeriveCommand(g))
	return c
}

func newKeyGetCommand(g *globals) *cobra.Command {
	var form keyForm
	var epoch uint32
	var server string
	c := &cobra.Command{
		Use:   "get SERVICE",
		Short: "Get this service's key from the broker",
		Long: `Get a service's key from the broker on this host: by its Unix socket, or by --server over loopback TCP.
The kernel tells the broker who asks; policy.toml says who may. The raw octets go to standard output, or in the form and to
the file that the flags say.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := derive.CheckKeyName(args[0]); err != nil {
				return usageError{err}
			}
			if err := form.check(g.stdout); err != nil {
				return usageError{err}
			}
			if err := checkServer(server); err != nil {
				return usageError{err}
			}
			key, err := g.fetchKey(cmd.Context(), args[0], epoch, server)
			if err != nil {
				return err
			}
			defer clear(key)
			return form.write(g.stdout, key)
		},
	}
	form.flags(c)
	c.Flags().Uint32Var(&epoch, "epoch", 0, "which `EPOCH` of the key (default the current one)")
	c.Flags().StringVar(&server, "server", "", "loopback `ADDR:PORT` of the broker, instead of its Unix socket")
	return c
}

// checkServer wants nothing, or an address where a broker of this host may be: whatever else answers would be taken for a key.
func checkServer(server string) error {
	if server == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(server)
	if _, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil || port == "0" || !slices.Contains([]string{"127.0.0.1", "::1", "localhost"}, host) {
		return fmt.Errorf("--server wants 127.0.0.1, [::1] or localhost with a port, as 127.0.0.1:7209, got %q: a broker on another host gives no keys", server)
	}
	return nil
}

// fetchKey is one GET /v1/keys/{service}.
func (g *globals) fetchKey(ctx context.Context, service string, epoch uint32, address string) ([]byte, error) {
	p, err := g.paths()
	if err != nil {
		return nil, err
	}
	s := unixServer(p.Socket)
	if address != "" {
		s = tcpServer(address)
	}
	url := "http://" + s.host + "/v1/keys/" + service
	if epoch > 0 {
		url += "?epoch=" + strconv.FormatUint(uint64(epoch), 10)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, usageError{err}
	}
	r.Header.Set("Keybroker", "1")
	key, err := s.answer(r)
	if err == nil && len(key) != 32 && len(key) != 64 {
		return nil, fmt.Errorf("what answers at %s is no broker: a key has 32 or 64 octets, this has %d", s.at, len(key))
	}
	return key, err
}

func (f *keyForm) toStdout() bool { return f.out == "" || f.out == "-" }

// check refuses to pour raw octets into a terminal.
func (f *keyForm) check(stdout io.Writer) error {
	file, ok := stdout.(*os.File)
	if f.toStdout() && !f.hex && !f.base64 && ok && term.IsTerminal(int(file.Fd())) {
		return errors.New("raw octets on a terminal: use --hex, --base64, --out FILE, or a pipe")
	}
	return nil
}

func (f *keyForm) write(stdout io.Writer, key []byte) error {
	octets := f.encode(key)
	defer clear(octets)
	if f.toStdout() {
		_, err := stdout.Write(octets)
		return err
	}
	return writeNew(f.out, octets)
}

func (f *keyForm) encode(key []byte) []byte {
	switch {
	case f.hex:
		return append(hex.AppendEncode(nil, key), '\n')
	case f.base64:
		return append(base64.StdEncoding.AppendEncode(nil, key), '\n')
	}
	return bytes.Clone(key)
}

// writeNew makes a file that did not exist, whole or not at all.
func writeNew(path string, octets []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o400)
	if errors.Is(err, fs.ErrExist) {
		return hintedError{fmt.Errorf("%s is there already", path), "remove it, or name a new file: a key never goes into a file that something else may have made"}
	}
	if err != nil {
		return fmt.Errorf("making the key's file: %w", err)
	}
	_, err = f.Write(octets)
	if err == nil {
		err = f.Sync()
	}
	if closing := f.Close(); err == nil {
		err = closing
	}
	if err != nil {
		os.Remove(path)
		return fmt.Errorf("writing %s: %w", filepath.Base(path), err)
	}
	return nil
}
