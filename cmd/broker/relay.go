package main

import (
	"context"
	"fmt"
	"net"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/mdlayher/vsock"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"keybroker/inject"
	"keybroker/internal/config"
	"keybroker/internal/relay"
)

func newRelayCommand(g *globals) *cobra.Command {
	var logs logFlags
	c := &cobra.Command{
		Use:   "relay HOST:PORT...",
		Short: "Copy this host's SNP guests' sessions to brokers elsewhere",
		Long: `Copy the sessions of this host's confidential guests to brokers on other hosts, until SIGTERM. Guests dial CID 2, vsock port 720,
from a port below 1024; the brokers' addresses are those of [relay] listen in their broker.toml. Each is tried 25 ms after the
one before it, and the last that answered first.

The relay needs no realm, no TPM and no policy: it can read nothing of what passes, and vouches for nobody. That is why a host
that runs SNP guests should have it in place of a broker: what protects the guests from this host is that their keys are not on
it. It needs CAP_NET_BIND_SERVICE for the port.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, brokers []string) error {
			for _, b := range brokers {
				if _, port, err := net.SplitHostPort(b); err != nil || port == "" {
					return usageError{fmt.Errorf("expected brokers as HOST:PORT, got %.80q", b)}
				}
			}
			log, err := logger(g, config.Default(), logs)
			if err != nil {
				return usageError{err}
			}
			r, err := relay.New(relay.Config{
				Brokers: brokers, Guest: relay.VsockGuest, Log: log,
				Dial: func(ctx context.Context, broker string) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, "tcp", broker)
				},
			})
			if err != nil {
				return err
			}
			l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, inject.Port, nil)
			if err != nil {
				return hintedError{fmt.Errorf("listening on vsock port %d: %w", inject.Port, err), "`modprobe vhost_vsock`, and run it as root or with CAP_NET_BIND_SERVICE; one relay for each host"}
			}
			daemon.SdNotify(false, daemon.SdNotifyReady)
			log.Info("relaying", "brokers", brokers)
			return r.Serve(cmd.Context(), l)
		},
	}
	logs.register(c)
	return c
}
