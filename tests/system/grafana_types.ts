// What a dashboard's JSON must be like, by Grafana's own types; test_grafana.py appends the JSON itself.
import type { Dashboard, DataSourceRef, FieldConfig, GraphFieldConfig, Panel, RowPanel } from '@grafana/schema';
import type { Options as BarGauge } from '@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen';
import type { Options as Stat } from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type { Options as TimeSeries } from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

// JSON holds the values of enumerations, not their names.
type Json<T> = T extends string
  ? `${T}`
  : T extends number | boolean | null | undefined
    ? T
    : T extends Array<infer U>
      ? Array<Json<U>>
      : T extends object
        ? { [K in keyof T]: Json<T[K]> }
        : T;

// Grafana leaves options, custom fields and targets open; each kind of panel has types of its own for the first two.
type Of<Kind, Options, Custom> = Omit<Panel, 'type' | 'options' | 'fieldConfig' | 'targets'> & {
  type: Kind;
  options: Partial<Options>;
  fieldConfig: { defaults: Omit<FieldConfig, 'custom'> & { custom?: Custom }; overrides: [] };
  targets: Array<{ refId: string; datasource: DataSourceRef; expr: string; legendFormat: string }>;
};
type KnownPanel =
  | RowPanel
  | Of<'timeseries', TimeSeries, GraphFieldConfig>
  | Of<'stat', Stat, never>
  | Of<'bargauge', BarGauge, never>;

export type DashboardJson = Json<Omit<Dashboard, 'panels'> & { panels: KnownPanel[] }>;
