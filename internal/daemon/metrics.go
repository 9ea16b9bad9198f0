package daemon

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"keybroker/inject"
)

// metrics are what /metrics on the admin socket shows. They hold no subject's name: whoever reads them learns numbers alone.
type metrics struct {
	registry *prometheus.Registry
	releases *prometheus.CounterVec // by tier
	refusals *prometheus.CounterVec // by tier and code
	sessions prometheus.Gauge       // open tier 3 connections
}

func newMetrics(realmOpen func() float64) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		releases: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keybroker_releases_total", Help: "Answers with keys, by tier."}, []string{"tier"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keybroker_refusals_total", Help: "Refusals, by tier and code."}, []string{"tier", "code"}),
		sessions: prometheus.NewGauge(prometheus.GaugeOpts{Name: "keybroker_vm_sessions", Help: "Open connections to virtual machines."}),
	}
	m.registry.MustRegister(m.releases, m.refusals, m.sessions,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "keybroker_realm_open", Help: "1 while the realm is open."}, realmOpen),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) released(tier string) { m.releases.WithLabelValues(tier).Inc() }

func (m *metrics) refused(tier string, code inject.Code) {
	m.refusals.WithLabelValues(tier, string(code)).Inc()
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}
